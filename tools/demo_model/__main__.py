"""The embedded demo model in one command, from the network's texts to its checkpoints:

    python -m tools.demo_model OUT

Steps whose result is there already are left out. So a machine without a network can be given out/demo-data/ with
facts.json, natural.jsonl.xz and tokenizer/, and a run that was interrupted goes on behind the last whole stage, once
the folder of the other is removed. Training needs a GPU. Each stage of RECIPE begins where the one before it ended,
with OUT/1/master, OUT/2/master, ..
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.demo_model.fetch import DATA

TOKENIZER = DATA / "tokenizer"


# Arguments of train.py. The last fifth of a longer schedule, twice: each begins with a higher rate again, and more of
# the hardest tasks (docs/demo-model.md).
RECIPE = (
    ["--steps", "3100"],
    ["--steps", "4200", "--at", "0.8"],
    ["--steps", "4600", "--at", "0.8", "--seed", "20261126"],
)


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
    masters = [out / str(number) / "master" for number in range(1, len(RECIPE) + 1)]
    for master, before, arguments in zip(masters, [None, *masters], RECIPE, strict=False):
        if not master.exists():
            weights = ["--weights", str(before)] if before else []
            found.append(["train", str(master.parent), "--tokenizer", str(TOKENIZER), *arguments, *weights])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the demo model.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for logs and checkpoints, one for each stage")
    for module, *arguments in steps(parser.parse_args().out):
        print(f"python -m tools.demo_model.{module} {' '.join(arguments)}", flush=True)
        run = subprocess.run([sys.executable, "-m", f"tools.demo_model.{module}", *arguments], check=False)
        if run.returncode:
            sys.exit(run.returncode)


if __name__ == "__main__":
    main()
