"""Floors of a decode step from bytes and FLOPs, and what they would mean on GB300. Nothing here is measured.

    python3 benchmarks/projection.py        # the tables of docs/performance.md

A GPU of an expert-parallel group holds all weights but the routed experts', which are spread over the group; it decodes
`batch` requests of its own. A layer is a row of stages that wait for one another. The floor of a stage is the longest
of its bytes over the memory rate, its FLOPs over the matrix rates of their formats, and what it sends over the NVLink
rate; floors add up. Formulas: docs/model.md sections 3 to 9 and 12 to 14, and the bench.py of the operations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "configs/models"
CONTEXT = 8192  # tokens that every request of the tables has


@dataclass(frozen=True)
class Gpu:
    """Datasheet rates of one GPU, dense: bytes and FLOPs per second."""

    name: str
    memory: float
    hbm_bytes: float
    flops: dict[str, float]
    nvlink: float  # each way


def gpu(name: str, memory_tb: float, hbm_gb: float, bf16_t: float, fp8_t: float, nvlink_gb: float) -> Gpu:
    """From the units of datasheets; TF32 has half the rate of BF16."""
    flops = {"tf32": bf16_t / 2 * 1e12, "bf16": bf16_t * 1e12, "fp8": fp8_t * 1e12}
    return Gpu(name, memory_tb * 1e12, hbm_gb * 1e9, flops, nvlink_gb * 1e9)


H100 = gpu("H100", 3.35, 80, 989, 1979, 450)
H200 = gpu("H200", 4.8, 141, 989, 1979, 450)
GB300 = gpu("GB300", 8.0, 288, 2500, 5000, 900)
GPUS = (H100, H200, GB300)


@dataclass(frozen=True)
class Assumed:
    """Parts of the datasheet rates that a projection takes for granted; docs/performance.md says why."""

    memory: float = 0.8
    matmul: float = 0.7
    nvlink: float = 0.7
    launch_s: float = 3e-6
    launches: int = 30  # of a layer


FLOOR = Assumed(1.0, 1.0, 1.0, 0.0, 0)


@dataclass(frozen=True)
class Stage:
    """What one GPU must move, compute and send for one stage of one layer."""

    name: str
    moved_bytes: float
    flops: dict[str, float] = field(default_factory=dict)  # by format
    sent_bytes: float = 0.0

    def seconds(self, on: Gpu, assumed: Assumed = FLOOR) -> float:
        """Time at the assumed parts of the rates."""
        compute = sum(flops / (on.flops[kind] * assumed.matmul) for kind, flops in self.flops.items())
        memory = self.moved_bytes / (on.memory * assumed.memory)
        return max(memory, compute, self.sent_bytes / (on.nvlink * assumed.nvlink))


def load(name: str) -> dict[str, Any]:
    """config.json of a model."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def fp8(num_rows: int, depth: int) -> int:
    """Bytes of an FP8 weight with a scale byte per block of 128 x 128."""
    return num_rows * depth + math.ceil(num_rows / 128) * math.ceil(depth / 128)


def expert_bytes(config: dict[str, Any]) -> int:
    """One routed expert: FP4 with a scale byte per 32."""
    return 3 * config["hidden_size"] * config["moe_intermediate_size"] * 17 // 32


def experts_hit(config: dict[str, Any], num_tokens: int) -> float:
    """Experts of a layer that at least one of the tokens chose, expected, when all are equally likely."""
    total, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    return float(total * (1 - (1 - chosen / total) ** num_tokens))


def ranks_hit(config: dict[str, Any], ep: int) -> float:
    """Other GPUs of the group that a token is sent to, expected."""
    total, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    missed = math.comb(total - total // ep, chosen) / math.comb(total, chosen)
    return (ep - 1) * (1 - missed)


def stages(config: dict[str, Any], ratio: int, batch: int, context: int, ep: int) -> list[Stage]:
    """One layer of a decode step: one token of each of `batch` requests that see `context` tokens."""
    d, qr, hd = config["hidden_size"], config["q_lora_rank"], config["head_dim"]
    heads, groups, rank = config["num_attention_heads"], config["o_groups"], config["o_lora_rank"]
    index_heads, index_dim, top_k = config["index_n_heads"], config["index_head_dim"], config["index_topk"]
    experts, chosen, width = config["n_routed_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]
    streams, row = config["hc_mult"], 584  # bytes of a stored row
    q = heads * hd

    entries = {0: 0, 4: min(context // 4, top_k), 128: context // 128}[ratio]
    raw = {0: 0, 4: 4 * hd + 4 * index_dim + index_heads, 128: 2 * hd}[ratio]  # outputs of the BF16 projections
    latent, wide = qr + hd, q + (index_heads * index_dim if ratio == 4 else 0)
    found = [
        Stage(
            "mHC, norms",
            2 * (24 * streams * d * 4 + batch * 2 * (2 * streams + 2) * d),
            {"tf32": 2 * batch * d * (2 * 24 * streams + 2 * streams**2 + 2 * streams)},
        ),
        Stage(
            "q, kv",
            fp8(latent, d) + fp8(wide, qr) + batch * (d + 2 * latent + qr + 2 * wide + 4 * q),
            {"fp8": 2 * batch * (latent * d + wide * qr)},
        ),
        Stage("compressor", 2 * raw * d + batch * (2 * d + 4 * raw), {"bf16": 2 * batch * raw * d}),
    ]
    if ratio == 4:
        keys = context // 4
        flops = batch * keys * (2 * index_heads * index_dim + 3 * index_heads)
        found.append(Stage("indexer", batch * keys * (index_dim // 2 + index_dim // 32), {"bf16": flops}))
    visible = min(context, config["sliding_window"]) + entries
    return [
        *found,
        Stage("attention", batch * (visible * row + 4 * q), {"bf16": 4 * batch * q * visible}),
        Stage(
            "output",
            fp8(groups * rank, q // groups) + fp8(d, groups * rank) + batch * 2 * (q + groups * rank + d),
            {"bf16": 2 * batch * rank * q, "fp8": 2 * batch * groups * rank * d},
        ),
        Stage("router", 2 * experts * d + batch * 2 * d, {"bf16": 2 * batch * experts * d}),
        Stage("shared expert", fp8(2 * width, d) + fp8(d, width), {"fp8": 6 * batch * d * width}),
        Stage(
            "routed experts",
            experts_hit(config, batch * ep) / ep * expert_bytes(config) + batch * 6 * d,
            {"fp8": 6 * batch * chosen * d * width},
        ),
        # E4M3 there with a scale per 128, BF16 back.
        Stage("exchange", 0.0, {}, batch * ranks_hit(config, ep) * (d + d // 128 + 2 * d)),
    ]


def step_seconds(config: dict[str, Any], on: Gpu, batch: int, context: int, ep: int, assumed: Assumed = FLOOR) -> float:
    """A decode step: all layers and the head; no speculation."""
    layers = config["compress_ratios"][: config["num_hidden_layers"]]
    each = {
        ratio: sum(stage.seconds(on, assumed) for stage in stages(config, ratio, batch, context, ep))
        for ratio in set(layers)
    }
    vocab, d = config["vocab_size"], config["hidden_size"]
    head = Stage("head", 2 * vocab * d + batch * (2 * d + 4 * vocab), {"bf16": 2 * batch * vocab * d})
    launches = len(layers) * assumed.launches * assumed.launch_s
    return sum(each[ratio] for ratio in layers) + head.seconds(on, assumed) + launches


def weight_bytes(config: dict[str, Any], ep: int) -> float:
    """Weights on one GPU: embedding, head, all layers; of the routed experts its share. Norms and sinks left out."""
    total = 4.0 * config["vocab_size"] * config["hidden_size"]
    for ratio in config["compress_ratios"][: config["num_hidden_layers"]]:
        total += sum(stage.moved_bytes for stage in stages(config, ratio, 0, 0, ep))
        total += config["n_routed_experts"] / ep * expert_bytes(config)
    return total


def cache_bytes(config: dict[str, Any], context: int) -> float:
    """Stored rows of one request, without the compressors' states: window, entries and index keys."""
    layers = config["compress_ratios"][: config["num_hidden_layers"]]
    each = {0: 0.0, 4: context / 4 * (584 + 68), 128: context / 128 * 584}
    return sum(config["sliding_window"] * 584 + each[ratio] for ratio in layers)


def floors(config: dict[str, Any], ratio: int, batch: int, ep: int) -> list[tuple[Stage, list[float]]]:
    """The stages of a layer, each with its floor on H100, H200 and GB300."""
    return [(stage, [stage.seconds(on) for on in GPUS]) for stage in stages(config, ratio, batch, CONTEXT, ep)]


def layer_table(config: dict[str, Any], ratio: int, batch: int, ep: int) -> Iterator[str]:
    """Bytes, FLOPs and floors of the stages of one layer."""
    yield "| stage | MB | GFLOP | H100 us | H200 us | GB300 us |"
    yield "|---|---|---|---|---|---|"
    for stage, times in floors(config, ratio, batch, ep):
        cells = [f"{(stage.sent_bytes or stage.moved_bytes) / 1e6:.1f}", f"{sum(stage.flops.values()) / 1e9:.2f}"]
        yield f"| {stage.name} | {' | '.join([*cells, *(f'{time * 1e6:.1f}' for time in times)])} |"


def sum_table(names: tuple[str, ...], batches: tuple[int, ...], ep: int) -> Iterator[str]:
    """Floors of whole layers."""
    yield "| model | ratio | batch | H100 us | H200 us | GB300 us |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        for ratio in (4, 128):
            for batch in batches:
                rows = [times for _, times in floors(load(name), ratio, batch, ep)]
                totals = [f"{sum(column) * 1e6:.0f}" for column in zip(*rows, strict=True)]
                yield f"| {name} | {ratio} | {batch} | {' | '.join(totals)} |"


def step_table(config: dict[str, Any], eps: tuple[int, ...], batches: tuple[int, ...]) -> Iterator[str]:
    """GB300: floor and projection of a decode step for each group size."""
    yield "| EP | batch a GPU | weights GB | with KV GB | floor ms | projected ms | tokens/s a user | tokens/s a GPU |"
    yield "|---|---|---|---|---|---|---|---|"
    for ep in eps:
        for batch in batches:
            weights = weight_bytes(config, ep)
            stored = weights + batch * cache_bytes(config, CONTEXT)
            floor = step_seconds(config, GB300, batch, CONTEXT, ep)
            step = step_seconds(config, GB300, batch, CONTEXT, ep, Assumed())
            yield (
                f"| {ep} | {batch} | {weights / 1e9:.0f} | {stored / 1e9:.0f} | {floor * 1e3:.2f} | {step * 1e3:.2f} | "
                f"{1 / step:.0f} | {batch / step:.0f} |"
            )


def tables() -> Iterator[str]:
    """All tables of docs/performance.md that are computed here."""
    for name in ("pro", "flash"):
        yield f"**{name}, one layer of ratio 4, 64 requests a GPU with {CONTEXT} tokens, EP 8**"
        yield from ("", *layer_table(load(name), 4, 64, 8), "")
    yield f"**Sums of a layer's stages, {CONTEXT} tokens, EP 8**"
    yield from ("", *sum_table(("pro", "flash"), (1, 16, 64, 256), 8), "")
    for name in ("pro", "flash"):
        yield f"**{name} on GB300, {CONTEXT} tokens, no speculation: a projection**"
        yield from ("", *step_table(load(name), (4, 8, 16, 32), (16, 64, 256)), "")


if __name__ == "__main__":
    print("\n".join(tables()).rstrip())
