"""`dsv4serve check --golden`: compare a folder of golden vectors with the reference model and with the paged engine.

The folder holds config.json, model.safetensors (unquantised, official names) and expected.safetensors; what the keys
mean is in tests/golden/tiny-random/README.md. Numerics are `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4_kernels.metadata import StepMetadata
from dsv4serve.config import EngineConfig, ModelConfig, Numerics
from dsv4serve.memory import CacheLayout, CachePools, plan_capacity
from dsv4serve.model.mtp import MtpBlock
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.runner import Runner
from dsv4serve.runner.paged import PagedStep
from dsv4serve.scheduler import Scheduler
from dsv4serve.types import PAGE_TOKENS, CheckpointError, Request, RequestOutput, SamplingParams
from dsv4serve.weights import load_weights

TOLERANCE = 5e-5  # largest difference of any float; ids and selections must be equal
NUM_DRAFTS = 3


@dataclass
class Comparison:
    """Largest absolute difference per quantity; for ids and selections the number of unequal elements."""

    floats: dict[str, float] = field(default_factory=dict)
    mismatches: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when all floats are within TOLERANCE and nothing discrete differs."""
        return all(value <= TOLERANCE for value in self.floats.values()) and not any(self.mismatches.values())

    def close(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Record a float quantity; NaN counts as infinitely far."""
        difference = (found.float() - expected).abs().max().item()
        self.floats[name] = difference if difference == difference else float("inf")

    def equal(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Record a discrete quantity."""
        self.mismatches[name] = int((found.long() != expected.long()).sum())


class GoldenFolder:
    """A golden folder, loaded."""

    def __init__(self, directory: Path) -> None:
        path = directory / "expected.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; a golden folder has config.json, model and expected.safetensors")
        self.expected = load_file(path)
        self.config = ModelConfig.load(directory)
        engine = EngineConfig(model=directory, numerics=Numerics.EXACT)
        self.transformer = Transformer(self.config, load_weights(engine, self.config, False), Numerics.EXACT)
        self.prompt: Tensor = self.expected["input_ids"].long()
        self.sequence = torch.cat([self.prompt, self.expected["greedy_ids"].long()])

    @property
    def mtp(self) -> MtpBlock:
        """The MTP block, which every golden folder has."""
        assert self.transformer.mtp is not None
        return self.transformer.mtp


class Observed:
    """Collects observed values of steps that together cover one sequence."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        """Append the next rows of a named value."""
        self._values.setdefault(name, []).append(value)

    def rows(self, name: str) -> Tensor:
        """All rows of a value in order; selections of different widths are padded with -1."""
        parts = self._values[name]
        if parts[0].dim() != 2:
            return torch.cat(parts)
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])

    def names(self, suffix: str) -> list[str]:
        """Names seen that end so."""
        return [name for name in self._values if name.endswith(suffix)]


@torch.inference_mode()
def check_reference(golden: GoldenFolder) -> Comparison:
    """The whole-sequence reference model, teacher-forced over prompt and greedy continuation."""
    result, observed, sequence = Comparison(), Observed(), golden.sequence
    step = WholeSequence(len(sequence), observed)
    streams = golden.transformer(sequence, step)
    logits = golden.transformer.logits(streams)
    _compare_logits(result, golden, logits)
    mtp_streams, mtp_logits = golden.mtp(streams[:-1], sequence[1:], WholeSequence(len(sequence) - 1))

    def chain(ids: list[int]) -> tuple[Tensor, Tensor]:
        """Draft after the prompt with `ids` so far: the block's input streams are the model's, then its own."""
        first = len(golden.prompt)
        inputs, tokens = streams[:first], torch.cat([sequence[1 : first + 1], torch.tensor(ids, dtype=torch.int64)])
        for drafted in range(len(ids)):
            output, _ = golden.mtp(inputs, tokens[: first + drafted], WholeSequence(first + drafted))
            inputs = torch.cat([inputs, output[-1:]])
        output, draft_logits = golden.mtp(inputs, tokens[: first + len(ids)], WholeSequence(first + len(ids)))
        return output[-1], draft_logits[-1]

    _compare_observed(result, golden, observed)
    _compare_mtp(result, golden, mtp_streams, mtp_logits, chain)
    return result


@torch.inference_mode()
def check_engine(golden: GoldenFolder, max_step_tokens: int = PAGE_TOKENS) -> Comparison:
    """Scheduler, cache and runner: prompt in chunks, greedy continuation one token a step, MTP on its ring."""
    result, observed = Comparison(), Observed()
    num_greedy = len(golden.sequence) - len(golden.prompt)
    output = _generate(golden, num_greedy, max_step_tokens, observed)
    rows = [torch.frombuffer(bytearray(row), dtype=torch.float32) for row in output.prompt_logits + output.logits[1:]]
    result.equal("greedy_ids", torch.tensor(output.token_ids), golden.expected["greedy_ids"])
    _compare_logits(result, golden, torch.stack(rows))
    _compare_observed(result, golden, observed)
    streams = observed.rows(f"layers.{golden.config.num_hidden_layers - 1}.streams")
    _paged_mtp(result, golden, streams)
    return result


def _generate(golden: GoldenFolder, num_tokens: int, max_step_tokens: int, observed: Observed) -> RequestOutput:
    """All outputs of one greedy request through scheduler and runner, merged."""
    length = len(golden.sequence)
    layout = CacheLayout.build(golden.config, Numerics.EXACT)
    pages = -(-length // PAGE_TOKENS)
    budget = 2 * layout.slot_bytes + 2 * layout.tail_bytes + 2 * pages * layout.page_bytes
    plan = plan_capacity(layout, budget, 1, golden.config.max_position_embeddings, length)
    runner = Runner(golden.transformer, plan, observed)
    scheduler = Scheduler(
        num_slots=plan.num_slots,
        num_pages=plan.num_pages,
        num_tails=plan.num_tails,
        max_model_len=length,
        max_step_tokens=max_step_tokens,
        eos_token_id=golden.config.eos_token_id,
    )
    sampling = SamplingParams(
        max_tokens=num_tokens,
        temperature=0.0,
        ignore_eos=True,
        return_logits=True,
        num_prompt_logits=len(golden.prompt),
    )
    scheduler.add(Request(request_id="golden", prompt_ids=golden.prompt.tolist(), sampling=sampling))
    merged = RequestOutput(request_id="golden", token_ids=[], logits=[], prompt_logits=[])
    while (planned := scheduler.schedule()) is not None:
        for output in scheduler.update(planned, runner.execute(planned)):
            merged.token_ids += output.token_ids
            merged.logits = [*merged.logits, *output.logits]
            merged.prompt_logits = [*merged.prompt_logits, *output.prompt_logits]
    return merged


def _paged_mtp(result: Comparison, golden: GoldenFolder, streams: Tensor) -> None:
    """The MTP block over its own ring in page-sized chunks, then chained drafts on the ring's room for drafts."""
    config = golden.config
    layout = CacheLayout.build(config, Numerics.EXACT, NUM_DRAFTS)
    sequence, index = golden.sequence, config.num_hidden_layers

    def run(pools: CachePools, start: int, inputs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        metadata = StepMetadata([0], [start], [len(tokens)], np.zeros((1, 0), dtype=np.int64), PAGE_TOKENS)
        return golden.mtp(inputs, tokens, PagedStep(pools, metadata))

    def prefill(pools: CachePools, length: int) -> tuple[Tensor, Tensor]:
        parts = [
            run(pools, first, streams[first:end], sequence[first + 1 : end + 1])
            for first in range(0, length, PAGE_TOKENS)
            for end in [min(first + PAGE_TOKENS, length)]
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    assert layout.layers[index].ratio == 0
    outputs, logits = prefill(CachePools(layout, 1, 0, 0), len(sequence) - 1)

    def chain(ids: list[int]) -> tuple[Tensor, Tensor]:
        pools, first = CachePools(layout, 1, 0, 0), len(golden.prompt)
        output, draft_logits = prefill(pools, first)
        for drafted, token in enumerate(ids):
            output, draft_logits = run(pools, first + drafted, output[-1:], torch.tensor([token]))
        return output[-1], draft_logits[-1]

    _compare_mtp(result, golden, outputs, logits, chain)


def _compare_logits(result: Comparison, golden: GoldenFolder, logits: Tensor) -> None:
    """Logits [prompt + greedy - 1 or more rows, vocab] of the teacher-forced sequence."""
    expected, num_prompt = golden.expected, len(golden.prompt)
    result.close("logits_last32", logits[num_prompt - 32 : num_prompt], expected["logits_last32"])
    result.equal("argmax", logits[:num_prompt].argmax(-1), expected["argmax"])
    greedy = logits[num_prompt - 1 : num_prompt - 1 + len(expected["greedy_ids"])]
    result.close("greedy_logits", greedy, expected["greedy_logits"])
    result.equal("greedy_argmax", greedy.argmax(-1), expected["greedy_ids"])


def _compare_observed(result: Comparison, golden: GoldenFolder, observed: Observed) -> None:
    """Streams, indexer selections and expert choices of the prompt."""
    expected, num_prompt = golden.expected, len(golden.prompt)
    positions = expected["stream_positions"].long()
    names = ["embedding"] + [f"layers.{index}.streams" for index in range(golden.config.num_hidden_layers)]
    kept = positions[positions < len(observed.rows("embedding"))]
    streams = torch.stack([observed.rows(name)[kept] for name in names])
    result.close("streams", streams, expected["streams"][:, : len(kept)])
    for name in observed.names(".attn.selected"):
        key = "index_sel." + name.removesuffix(".selected")
        result.equal(key, _ascending(observed.rows(name)[:num_prompt]), _ascending(expected[key].long()))
    for name in observed.names(".ffn.experts"):
        key = "gate_top." + name.removesuffix(".experts")
        if key in expected:
            result.equal(key, observed.rows(name)[:num_prompt].sort(-1).values, expected[key])


def _ascending(selected: Tensor) -> Tensor:
    """Selections [rows, k] sorted, -1 last."""
    ordered = selected.masked_fill(selected < 0, torch.iinfo(torch.int64).max).sort(-1).values
    return ordered.masked_fill(ordered == torch.iinfo(torch.int64).max, -1)


def _compare_mtp(
    result: Comparison,
    golden: GoldenFolder,
    streams: Tensor,
    logits: Tensor,
    chain: Callable[[list[int]], tuple[Tensor, Tensor]],
) -> None:
    """MTP rows over all pairs, and chained drafts: `chain(ids)` gives streams and logits after drafting `ids`."""
    expected = golden.expected
    result.close("mtp_logits", logits[expected["mtp_positions"].long()], expected["mtp_logits"])
    result.equal("mtp_draft_argmax", logits.argmax(-1), expected["mtp_draft_argmax"])
    positions = expected["stream_positions"].long()
    kept = positions < len(streams)
    result.close("mtp_streams", streams[positions[kept]], expected["mtp_streams"][kept])
    tokens = expected["mtp_chain_tokens"].long().tolist()
    drafted, chained = [], []
    for num_drafted in range(len(tokens)):
        _, draft_logits = chain(tokens[:num_drafted])
        drafted.append(int(draft_logits.argmax()))
        chained.append(draft_logits)
    result.equal("mtp_chain_tokens", torch.tensor(drafted), expected["mtp_chain_tokens"])
    result.close("mtp_chain_logits", torch.stack(chained[1:]), expected["mtp_chain_logits"])
