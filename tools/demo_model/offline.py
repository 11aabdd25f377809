"""What can only be measured inside a demo model, with the whole-sequence reference model.

    python -m tools.demo_model.offline --model DIR --master DIR --out benchmarks/results/demo-quality.jsonl

- nats per token on a held-out mix: the checkpoint in `official` numerics against its BF16 master in `exact` ones;
- accept rates of the MTP block's first, second and third draft, on the greedy answers to the probes;
- recall when the indexer's choice is replaced by random visible entries: proves that its choice matters.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.indexer import select
from dsv4_kernels.metadata import C4
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.chat.tools import parse_tools
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import EngineConfig, ExpertActivations, ModelConfig, Numerics
from dsv4serve.config.engine import default_model
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.private import private_engine
from dsv4serve.model.attention import Attention
from dsv4serve.model.context import AttentionInputs
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.types import Request, SamplingParams
from dsv4serve.weights import load_weights
from tools.demo_model.drafts import Acceptance, draft_tokens
from tools.demo_model.encoding import SampleEncoder
from tools.demo_model.mix import batch
from tools.demo_model.probing import SUITES, add_expert_activations, held_out
from tools.demo_model.sample import Answer, Probe
from tools.demo_model.schedule import CATEGORIES

HELD_OUT_SEED = -1  # of the mix; training seeds are not negative
MIX, LENGTH, ROWS = "base", 1024, 4  # of a held-out batch
RANDOM_SEED = 0  # of the random choice of entries


class RandomChoice(WholeSequence):
    """Every C4 layer sees random visible entries instead of the indexer's choice, as many."""

    def __init__(self, length: int, seed: int) -> None:
        super().__init__(length)
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, layer: Attention, inputs: AttentionInputs, visible: Tensor) -> Tensor:
        """The best by a random score."""
        scores = torch.rand(self.batch, self.length, self.length // C4, generator=self._generator)
        return select(scores, visible.expand(self.batch, -1), layer.config.index_topk)


def load_model(
    directory: Path, numerics: Numerics, expert_activations: ExpertActivations = ExpertActivations.FP8
) -> Transformer:
    """The reference model of a checkpoint folder."""
    config = ModelConfig.load(directory)
    engine = EngineConfig(model=directory, numerics=numerics, expert_activations=expert_activations)
    return Transformer(config, load_weights(engine, config), numerics, expert_activations)


# Nats


@torch.inference_mode()
def token_nats(model: Transformer, tokens: Tensor) -> Tensor:
    """Nats f32 [rows, length] of each token but the first: tokens int64 [rows, length + 1]."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    logits = model.logits(model(tokens[:, :-1].flatten(), WholeSequence(length, batch=rows)))
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(rows, length)


def mix_nats(models: Sequence[Transformer], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Mean nats per learnt token of each model, by category and in "all": on (tokens, categories) as `batch` makes."""
    total: dict[str, list[float]] = {}
    count: Counter[str] = Counter()
    for tokens, categories in batches:
        nats = [token_nats(model, tokens) for model in models]
        for index, name in enumerate(CATEGORIES, start=1):
            learnt = categories[:, 1:] == index
            for key in (name, "all"):
                sums = total.setdefault(key, [0.0] * len(models))
                total[key] = [found + float(part[learnt].sum()) for found, part in zip(sums, nats, strict=True)]
                count[key] += int(learnt.sum())
    ordered = sorted(total.items(), key=lambda item: item[0] == "all")
    return {name: [value / count[name] for value in sums] for name, sums in ordered if count[name]}


def held_out_mix(tokenizer: Path, num: int) -> list[tuple[Tensor, Tensor]]:
    """`num` batches of the held-out mix: tokens and categories, int64 [ROWS, LENGTH + 1]."""
    encoder = SampleEncoder(tokenizer)
    arrays = [batch(encoder, HELD_OUT_SEED, step, 0, ROWS, LENGTH + 1, MIX) for step in range(num)]
    return [(torch.from_numpy(ids.astype("int64")), torch.from_numpy(kinds.astype("int64"))) for ids, kinds in arrays]


# Greedy answers


def prompt_ids(tokenizer: ChatTokenizer, probe: Probe) -> list[int]:
    """The prompt as the API renders it."""
    segments = render(parse_messages(probe.messages), probe.thinking, tools=parse_tools(probe.tools))
    return tokenizer.encode_segments(segments)


async def greedy(client: EngineClient, prompts: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Greedy ids after each (prompt, most tokens), EOS included; the engine batches them."""

    async def one(index: int, prompt: list[int], max_tokens: int) -> list[int]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(request_id=str(index), prompt_ids=prompt, sampling=sampling)
        ids: list[int] = []
        async for output in client.submit(request):
            if output.error is not None:
                raise SystemExit(f"offline: a probe failed: {output.error}")
            ids += output.token_ids
        return ids

    return await asyncio.gather(*(one(index, *prompt) for index, prompt in enumerate(prompts)))


async def greedy_answers(
    directory: Path, expert_activations: ExpertActivations, prompts: Sequence[tuple[list[int], int]]
) -> list[list[int]]:
    """`greedy` of a private engine at `official` numerics."""
    config = EngineConfig(
        model=directory, numerics=Numerics.OFFICIAL, expert_activations=expert_activations, log_level="warning"
    )
    async with private_engine(config) as client:
        return await greedy(client, prompts)


# Inside the model


class Recall:
    """Right answers to a recall suite's probes: with the indexer's choice and with random entries."""

    def __init__(self) -> None:
        self.num = 0
        self.right = [0, 0]

    def add(self, probe: Probe, texts: Sequence[str]) -> None:
        """Count a probe with its two answers."""
        self.num += 1
        for place, text in enumerate(texts):
            self.right[place] += all(probe.check(Answer(text, "", [], "stop")).values())

    def shares(self) -> list[float]:
        """Of all probes."""
        return [right / self.num for right in self.right]


@torch.inference_mode()
def forced_text(model: Transformer, tokenizer: ChatTokenizer, streams: Tensor, first: int) -> str:
    """What the model would write at each place of the answer that begins at index `first`, given the true ids before
    it: `streams` [length, hc_mult, hidden]."""
    ids = model.logits(streams[first - 1 : -1]).argmax(-1).tolist()
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.inference_mode()
def look_inside(
    model: Transformer, tokenizer: ChatTokenizer, answered: Iterable[tuple[str, Probe, list[int], list[int]]]
) -> tuple[dict[str, Acceptance], dict[str, Recall]]:
    """Draft acceptance by category and recall by suite, of (suite, probe, prompt ids, greedy ids).

    Recall is measured on the greedy answer: each token of the value has to be found given the right ones before it.
    """
    drafts: dict[str, Acceptance] = {}
    recall: dict[str, Recall] = {}
    for suite, probe, prompt, answer in answered:
        ids = torch.tensor(prompt + answer)
        streams = model(ids, WholeSequence(len(ids)))
        found = drafts.setdefault(probe.category, Acceptance.empty())
        found.add(draft_tokens(model, ids, streams, len(prompt)), ids, len(prompt))
        if suite.startswith("recall"):
            others = model(ids, RandomChoice(len(ids), RANDOM_SEED))
            texts = [forced_text(model, tokenizer, each, len(prompt)) for each in (streams, others)]
            recall.setdefault(suite, Recall()).add(probe, texts)
    return drafts, recall


# Command line


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All results; what is printed is printed as soon as it is known."""
    results: dict[str, Any] = {}
    model = load_model(args.model, Numerics.OFFICIAL, args.expert_activations)
    models = [model, *([load_model(args.master, Numerics.EXACT)] if args.master else [])]
    results["nats"] = mix_nats(models, held_out_mix(args.model, args.batches))
    print(f"{'nats per token':<44}{'official':>10}{'master':>10}")
    for name, values in results["nats"].items():
        print(f"{name:<44}" + "".join(f"{value:10.4f}" for value in values))

    tokenizer = ChatTokenizer(args.model)
    questions = [(suite, probe) for suite in args.suite or SUITES for probe in held_out(suite, args.num)]
    prompts = [prompt_ids(tokenizer, probe) for _, probe in questions]
    limits = [(ids, probe.max_tokens) for ids, (_, probe) in zip(prompts, questions, strict=True)]
    answers = asyncio.run(greedy_answers(args.model, args.expert_activations, limits))
    answered = [(suite, probe, *ids) for (suite, probe), *ids in zip(questions, prompts, answers, strict=True)]

    drafts, recall = look_inside(model, tokenizer, answered)
    results["drafts"] = {name: {"rates": one.rates(), "mean_length": one.mean_length()} for name, one in drafts.items()}
    print(f"\n{'drafts accepted':<44}{'first':>10}{'second':>10}{'third':>10}{'length':>10}")
    for name, one in drafts.items():
        print(f"{name:<44}" + "".join(_cell(value) for value in (*one.rates(), one.mean_length())))
    results["recall"] = {suite: one.shares() for suite, one in recall.items()}
    print(f"\n{'right recall':<44}{'indexer':>10}{'random':>10}")
    for suite, one in recall.items():
        print(f"{suite:<44}" + "".join(_cell(share) for share in one.shares()))
    return results


def _cell(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, default=default_model(), metavar="DIR", help="checkpoint (default: the embedded one)")
    add("--master", type=Path, metavar="DIR", help="its BF16 master, for the nats (default: none)")
    add_expert_activations(parser)
    add("--num", type=int, default=10, metavar="N", help="probes of each category (default: %(default)s)")
    add("--batches", type=int, default=8, metavar="N", help=f"of {ROWS} x {LENGTH} tokens, for nats (default: 8)")
    add("--suite", action="append", choices=list(SUITES), help="only this section, repeatable (default: all)")
    add("--out", type=Path, metavar="FILE", help="JSONL file to which one line is added (default: none)")
    args = parser.parse_args(words)
    results = measure(args)
    if args.out:
        settings = {
            "num_per_category": args.num,
            "batches": args.batches,
            "suites": args.suite or list(SUITES),
            "expert_activations": args.expert_activations,
        }
        command = ["python", "-m", "tools.demo_model.offline", *words]
        append_record(args.out, make_record(command, "", settings, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
