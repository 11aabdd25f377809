"""Who may import whom, which rooms are free of torch, how long a file may be, what the wheel holds."""

import ast
import subprocess
import sys
import tomllib

import pytest

BASE = {"types", "config", "obs"}  # what every room may use
ALLOWED = {
    "types": set(),
    "config": {"types"},
    "obs": {"types", "config"},
    "cache": BASE,
    "scheduler": BASE | {"cache"},
    "chat": BASE,
    "constrained": BASE | {"chat"},
    "memory": BASE | {"dsv4_kernels"},
    "weights": BASE | {"dsv4_kernels"},
    "model": BASE | {"dsv4_kernels"},
    "distributed": BASE | {"dsv4_kernels"},
    "speculative": BASE | {"dsv4_kernels", "memory", "model"},
    "runner": BASE | {"dsv4_kernels", "memory", "weights", "model", "speculative", "constrained", "distributed"},
    "engine": BASE | {"scheduler", "cache", "runner"},
    "api": BASE | {"engine", "chat", "constrained"},
    "cli": BASE
    | {"api", "chat", "engine", "scheduler", "cache", "runner", "model", "weights", "memory", "dsv4_kernels"},
    "dsv4_kernels": set(),
}
TORCH_FREE = ("types", "config", "obs", "cache", "scheduler", "chat", "api")


def sources(root):
    """(room, path) of every Python file of the two packages."""
    for path in sorted((root / "dsv4serve").rglob("*.py")):
        parts = path.relative_to(root / "dsv4serve").parts
        yield (parts[0] if len(parts) > 1 else "package"), path
    for path in sorted((root / "kernels").rglob("*.py")):
        yield "dsv4_kernels", path


def imported_modules(path):
    """Absolute names of all modules that a file imports, wherever in the file, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module):
    """The room a module belongs to; None for other people's packages and for dsv4serve itself."""
    parts = module.split(".")
    if parts[0] == "dsv4_kernels":
        return "dsv4_kernels"
    return parts[1] if parts[0] == "dsv4serve" and len(parts) > 1 else None


def test_every_room_has_a_place_in_the_order(root):
    assert {room for room, _ in sources(root)} - {"package"} <= set(ALLOWED)


def test_imports_go_one_way(root):
    wrong = []
    for room, path in sources(root):
        if room == "package":
            continue
        for module, line in imported_modules(path):
            other = room_of(module)
            if other in ALLOWED and other != room and other not in ALLOWED[room]:
                wrong.append(f"{path.relative_to(root)}:{line}: {room} must not import {module}")
    assert not wrong, "\n".join(wrong)


def test_torch_free_rooms_import_no_torch(root):
    wrong = [
        f"{path.relative_to(root)}:{line}: {module}"
        for room, path in sources(root)
        if room in TORCH_FREE
        for module, line in imported_modules(path)
        if module.split(".")[0] in ("torch", "triton", "transformers", "safetensors")
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_is_not_loaded_by_anything_a_frontend_or_the_launcher_needs(root):
    modules = [f"dsv4serve.{room}" for room in TORCH_FREE]
    modules += [
        ".".join(path.relative_to(root).with_suffix("").parts) for room, path in sources(root) if room in TORCH_FREE
    ]
    modules += ["dsv4serve.engine.client", "dsv4serve.engine.supervisor", "dsv4serve.cli.launch", "dsv4serve.cli.bench"]
    modules = [module.removesuffix(".__init__") for module in modules if not module.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' loads torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["dsv4serve", "kernels", "tests", "benchmarks"])
def test_no_file_is_longer_than_500_lines(root, folder):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (root / folder).rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 500}


def test_the_wheel_holds_every_package(root):
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"dsv4serve_configs"}
    for top, name in (("dsv4serve", "dsv4serve"), ("kernels", "dsv4_kernels")):
        for path in (root / top).rglob("__init__.py"):
            found.add(".".join([name, *path.parent.relative_to(root / top).parts]))
    assert found == set(setuptools["packages"])


def test_test_files_have_different_names(root):
    paths = (root / "tests").rglob("test_*.py")
    names = [path.name for path in paths if not (path.parent / "__init__.py").exists()]  # a package has its own names
    assert sorted(names) == sorted(set(names))
