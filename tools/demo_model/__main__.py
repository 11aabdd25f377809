"""The demo model in one command, from the network's texts to its checkpoints:

    python -m tools.demo_model OUT [arguments of train.py]

Steps whose result is there already are left out, so that a machine without a network can be given out/demo-data/ with
facts.json, natural.jsonl.xz and tokenizer/. The last step needs a GPU; its seed is train.py's.
"""

from __future__ import annotations

import subprocess
import sys

from tools.demo_model.fetch import DATA

TOKENIZER = DATA / "tokenizer"


def steps(arguments: list[str]) -> list[list[str]]:
    """Modules with their arguments, in order."""
    found: list[list[str]] = []
    for module, made in (("extract_facts", "facts.json"), ("builders.natural", "natural.jsonl.xz")):
        if not (DATA / made).exists():
            found.append([module])
    if found and not (DATA / "raw" / "DATA_LICENSES.md").exists():
        found.insert(0, ["fetch"])
    if not TOKENIZER.exists():
        found.append(["tokenizer", str(TOKENIZER)])
    return [*found, ["train", *arguments, "--tokenizer", str(TOKENIZER)]]


def main() -> None:
    """Command line."""
    for module, *arguments in steps(sys.argv[1:]):
        print(f"python -m tools.demo_model.{module} {' '.join(arguments)}", flush=True)
        run = subprocess.run([sys.executable, "-m", f"tools.demo_model.{module}", *arguments], check=False)
        if run.returncode:
            sys.exit(run.returncode)


if __name__ == "__main__":
    main()
