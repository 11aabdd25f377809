"""The embedded demo model in one command, from the network's texts to its checkpoints:

    python -m tools.demo_model OUT

Steps whose result is there already are left out. So a machine without a network can be given out/demo-data/ with
facts.json, natural.jsonl.xz and tokenizer/. Training needs a GPU; it leaves OUT/official, OUT/master, OUT/log.jsonl.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.demo_model.fetch import DATA

TOKENIZER = DATA / "tokenizer"


def steps(out: Path) -> list[list[str]]:
    """Modules with their arguments, in order."""
    found: list[list[str]] = []
    for module, made in (("extract_facts", "facts.json"), ("builders.natural", "natural.jsonl.xz")):
        if not (DATA / made).exists():
            found.append([module])
    if found and not (DATA / "raw" / "DATA_LICENSES.md").exists():
        found.insert(0, ["fetch"])
    if not TOKENIZER.exists():
        found.append(["tokenizer", str(TOKENIZER)])
    if not (out / "master").exists():
        found.append(["train", str(out), "--tokenizer", str(TOKENIZER)])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the demo model.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for log and checkpoints")
    for module, *arguments in steps(parser.parse_args().out):
        print(f"python -m tools.demo_model.{module} {' '.join(arguments)}", flush=True)
        run = subprocess.run([sys.executable, "-m", f"tools.demo_model.{module}", *arguments], check=False)
        if run.returncode:
            sys.exit(run.returncode)


if __name__ == "__main__":
    main()
