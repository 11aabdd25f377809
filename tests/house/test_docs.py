"""What the documents name must exist, and what exists must be in the documents."""

import importlib
import re
import subprocess
import sys

import pytest

from dsv4serve.cli.main import COMMANDS, build_parser
from dsv4serve.config import EngineConfig, load_engine_config

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`([\w./-]+\.(?:py|yaml|json|md|toml|jsonl))(?:::\w+)?`")
RECIPES = ("cpu.yaml", "h200.yaml", "gb300.yaml")


def documents(root):
    """Markdown files that people read, hidden folders left out."""
    return [
        path for path in root.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def anchors(text):
    """The ids that headings of a Markdown page get."""
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_resolve(root):
    broken = []
    for page in documents(root):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_named_exists(root, page):
    named = set(NAMED_FILE.findall((root / page).read_text(encoding="utf-8")))
    assert named
    missing = {name for name in named if "/" in name and not (root / name).exists()}
    assert not missing


def test_the_path_of_a_request_names_every_room(root):
    text = (root / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (root / "dsv4serve").glob("*/__init__.py")}
    assert not {room for room in rooms if f"dsv4serve/{room}/" not in text}


def test_every_command_is_in_the_readme(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"dsv4serve {name}" not in text]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_says_what_it_does(command):
    parser = build_parser(command)
    (subparsers,) = (action for action in parser._actions if action.dest == "command")
    silent = [
        action.dest for action in subparsers.choices[command]._actions if not (action.help and len(action.help) > 5)
    ]
    assert not silent
    assert callable(importlib.import_module(f"dsv4serve.cli.{command}").run)


def test_every_engine_setting_is_in_the_help_of_launch():
    done = subprocess.run(
        [sys.executable, "-m", "dsv4serve.cli.main", "launch", "--help"], capture_output=True, text=True, check=True
    )
    assert not [name for name in EngineConfig.model_fields if f"--{name.replace('_', '-')}" not in done.stdout]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(root, name):
    config = load_engine_config(recipe=root / "configs/recipes" / name)
    assert config.max_running_requests >= 16


def test_there_is_no_recipe_without_a_test(root):
    assert {path.name for path in (root / "configs/recipes").iterdir()} == set(RECIPES)


def test_ci_runs_the_command_of_the_readme(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in ("serve", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (root / ".ci/run").read_text(encoding="utf-8")
