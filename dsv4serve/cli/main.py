"""The `dsv4serve` command: finds the subcommand, turns errors into one line and an exit code.

Exit codes: 0 done, 1 the work failed, 2 wrong arguments, configuration or checkpoint, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from dsv4serve import __version__
from dsv4serve.types import Dsv4Error

# One module in dsv4serve.cli per name, with add_parser(subparsers) and run(args) -> exit code. Only the one
# that was asked for is imported: some bring torch, and none may break the others.
COMMANDS = {
    "launch": "serve a checkpoint over HTTP",
    "chat": "chat in the terminal with a running server or a private one",
    "generate": "generate offline, without a server",
    "render": "show the prompts of chat requests",
    "parse": "show the messages of raw completions",
    "check": "show environment and capacity plan, verify a checkpoint or golden vectors",
    "bench": "load a running server and measure it",
    "convert": "turn a checkpoint into another format",
}


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """The root parser; `selected` (a key of COMMANDS) also gets its options."""
    parser = argparse.ArgumentParser(
        prog="dsv4serve",
        description="A serving engine for DeepSeek-V4.",
        epilog="Each command explains itself: dsv4serve COMMAND --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsv4serve {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == selected:
            importlib.import_module(f"dsv4serve.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    selected = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = build_parser(selected).parse_args(argv)
        code: int = importlib.import_module(f"dsv4serve.cli.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except Dsv4Error as error:
        print(f"dsv4serve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) went away; keep the interpreter's own flush quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("dsv4serve.", "dsv4_kernels.")):
            raise
        print(f"dsv4serve: {selected} needs the Python package {error.name!r}, which is not installed", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
