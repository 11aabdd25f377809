"""The root command: help, version, exit codes, laziness."""

import subprocess
import sys
from types import ModuleType

import pytest

from dsv4serve import __version__
from dsv4serve.cli.main import COMMANDS, main
from dsv4serve.types import CheckpointError, Dsv4Error


@pytest.fixture
def command(monkeypatch):
    """Replaces `dsv4serve check` by a function."""

    def install(run):
        module = ModuleType("dsv4serve.cli.check")
        module.add_parser = lambda subparsers: subparsers.add_parser("check").add_argument("--depth", type=int)
        module.run = run
        monkeypatch.setitem(sys.modules, "dsv4serve.cli.check", module)

    return install


def test_help_names_every_command_and_imports_none_of_them():
    code = (
        "import sys; from dsv4serve.cli.main import COMMANDS, main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "loaded = [name for name in COMMANDS if 'dsv4serve.cli.' + name in sys.modules]\n"
        "assert not loaded and 'torch' not in sys.modules, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    assert all(f"{name} {summary}" in shown for name, summary in COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dsv4serve {__version__}\n"


def test_exit_code_of_the_command_is_returned(command):
    command(lambda args: args.depth)
    assert main(["check", "--depth", "7"]) == 7


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["check", "--depth", "x"], ["check", "--unknown"]])
def test_wrong_arguments_exit_2(command, capsys, argv):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "dsv4serve" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(CheckpointError("model.safetensors: short"), 2), (Dsv4Error("no"), 1)])
def test_an_error_meant_for_people_is_one_line(command, capsys, error, code):
    def run(args):
        raise error

    command(run)
    assert main(["check"]) == code
    assert capsys.readouterr().err == f"dsv4serve: {error}\n"


def test_interrupt_exits_130(command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert main(["check"]) == 130


def test_a_missing_package_is_named_but_our_own_missing_module_is_a_bug(command, capsys):
    def run(args):
        __import__(args_name)

    command(run)
    args_name = "a_package_that_nobody_has"
    assert main(["check"]) == 1
    assert args_name in capsys.readouterr().err
    args_name = "dsv4serve.absent_room"
    with pytest.raises(ModuleNotFoundError):
        main(["check"])


def test_a_reader_that_goes_away_is_no_traceback():
    code = (
        "import sys, types\n"
        "check = sys.modules['dsv4serve.cli.check'] = types.ModuleType('check')\n"
        "check.add_parser = lambda subparsers: subparsers.add_parser('check')\n"
        "check.run = lambda args: print('a line\\n' * 100_000)\n"
        "from dsv4serve.cli.main import main\n"
        "sys.exit(main(['check']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
