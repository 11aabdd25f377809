"""Arithmetic of ablation.py: how many requests a cache holds, and throughput at equal interactivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4serve.config import ModelConfig
from dsv4serve.memory import CacheLayout, plan_capacity
from dsv4serve.types import PAGE_TOKENS, CapacityError

WINDOW_SHARE = 0.1  # window rows for each token of the cache, in pages of 256 tokens
KV_BYTES, INDEX_BYTES = 584, 132  # of a row; index keys are FP8 with a float32 scale


def day0_token_bytes(model: ModelConfig, drafts: bool = False) -> float:
    """Bytes that a token of the context costs an engine of April 2026.

    Its cache has pages of 256 tokens, and a tenth as many window rows in pages of their own, whatever a request's
    window is. A page of window rows also carries a ring of float32 rows for each compressor: 8 for C4 and 128 for C128,
    twice as many with drafts, for which there is one more layer. Pro with drafts: 23,749.84, which the log of such an
    engine says (sgl-project/sglang issue 24523); without them nobody published it.
    """
    num_c4, num_c128 = (model.layer_ratios.count(ratio) for ratio in (4, 128))
    compressed = num_c4 * (KV_BYTES + INDEX_BYTES) / 4 + num_c128 * KV_BYTES / 128
    c4_row, c128_row = 16 * (model.head_dim + model.index_head_dim), 8 * model.head_dim
    rings = (num_c4 * 8 * c4_row + num_c128 * 128 * c128_row) * (1 + drafts) / PAGE_TOKENS
    window = KV_BYTES * (model.num_hidden_layers + drafts) + rings
    return WINDOW_SHARE * window + compressed


def day0_requests(model: ModelConfig, cache_bytes: int, num_tokens: int) -> int:
    """Requests of `num_tokens` each that fit at once, nothing being kept for prefixes."""
    return int(cache_bytes / (day0_token_bytes(model) * -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS))


def requests_that_fit(layout: CacheLayout, cache_bytes: int, num_tokens: int) -> int:
    """The same of this engine: the most slots with pages for all in the plan of `dsv4serve check`, beside its tails."""
    pages = -(-num_tokens // PAGE_TOKENS)

    def fits(num_slots: int) -> bool:
        try:
            plan = plan_capacity(layout, cache_bytes, num_slots, pages * PAGE_TOKENS)
        except CapacityError:
            return False
        return plan.num_pages >= num_slots * pages

    return _largest(fits, cache_bytes // layout.slot_bytes)


@dataclass(frozen=True)
class Side:
    """One way to run the model, as ablation.py's docstring says."""

    decode_ms: Mapping[int, float]  # by batch size, ascending
    prefill_ms: float  # of num_input tokens
    num_input: int
    num_output: int
    most: int  # requests that fit into the cache

    def tpot_ms(self, batch: int) -> float:
        """Time of an output token with `batch` requests open."""
        sizes = list(self.decode_ms)
        decode = self.decode_ms[sizes[0]]
        if len(sizes) > 1:
            above = next((place for place, size in enumerate(sizes) if size >= batch), len(sizes) - 1)
            low, high = sizes[max(above - 1, 0)], sizes[max(above, 1)]
            slope = (self.decode_ms[high] - self.decode_ms[low]) / (high - low)
            decode = self.decode_ms[low] + max(slope, 0.0) * (batch - low)
        return decode + batch * self.prefill_ms / self.num_output

    def tokens_per_s(self, batch: int) -> float:
        """Input and output tokens."""
        return 1e3 * batch * (self.num_input + self.num_output) / self.num_output / self.tpot_ms(batch)

    def largest(self, tpot_ms: float, most: int) -> int:
        """The most requests, up to `most`, whose tokens take no longer; 0 if one takes longer."""
        return _largest(lambda batch: self.tpot_ms(batch) <= tpot_ms * (1 + 1e-9), most)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest of 1 .. most that holds, where all smaller ones do; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def at_equal_interactivity(on: Side, off: Side, batch: int) -> dict[str, float]:
    """What `on` does at the interactivity that `off` has with `batch` requests.

    `ratio_of_speed` is that of throughput if `on` had no more memory for requests than `off`.
    """
    tpot = off.tpot_ms(batch)
    mine = on.largest(tpot, on.most)
    same = on.largest(tpot, min(on.most, off.most))
    throughput = off.tokens_per_s(batch)
    return {
        "interactivity": round(1e3 / tpot, 3),
        "batch_off": batch,
        "tokens_per_s_off": round(throughput, 1),
        "batch_on": mine,
        "tokens_per_s_on": round(on.tokens_per_s(mine), 1),
        "ratio": round(on.tokens_per_s(mine) / throughput, 3),
        "ratio_of_speed": round(on.tokens_per_s(same) / throughput, 3),
    }


def table(name: str, results: dict[str, Any]) -> str:
    """What the last line of a model says, for people."""
    lines = [f"{name}: off | decode x, +ms, launches | prefill x, +ms, launches"]
    for line in results["switches"]:
        parts = (
            f"{line[f'{step}_ratio']:.3f} {line[f'{step}_more_ms']:+9.3f} {line[f'{step}_launches']:6}"
            for step in ("decode", "prefill")
        )
        lines.append(f"  {line['off']:26} | " + " | ".join(parts))
    fits, weigh = results["requests_that_fit"], results["bytes_of_a_request"]
    lines.append(f"  a request weighs {weigh['on']:,} bytes, on day 0 {weigh['off']:,}")
    lines.append(f"  requests in the cache: {fits['on']}, on day 0 {fits['off']}")
    for off, rows in results["equal_interactivity"].items():
        lines.append(f"  tokens/s/user | {off}: batch, tokens/s | as it is: batch, tokens/s | ratio, with equal memory")
        for row in rows:
            lines.append(
                f"  {row['interactivity']:>13.2f} | {row['batch_off']:4} {row['tokens_per_s_off']:>10,.0f} | "
                f"{row['batch_on']:4} {row['tokens_per_s_on']:>10,.0f} | {row['ratio']:.2f} {row['ratio_of_speed']:.2f}"
            )
    return "\n".join(lines)
