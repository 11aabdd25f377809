"""The device's network, step and runner against the CPU engine with official numerics. The device is a parameter: CUDA
on a GPU machine, the CPU with Triton's interpreter elsewhere (import support.triton_interpreter first).

Bounds are relative norms. Given the same input a layer differs by roundings that other sums decide (a bfloat16 weight
of attention, an FP8 hidden value). Over all layers of a random network each of them moves later ones, and now and then
another expert or entry is chosen; so whole logits are compared by the median of their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from support.models import oracle_logits, random_ids
from torch import Tensor

from dsv4_kernels.gemm.library import linear_bf16, linear_fp8
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.reference import linear
from dsv4_kernels.kv_store import decode
from dsv4_kernels.metadata import Rows, StepMetadata
from dsv4_kernels.mhc import mhc_post
from dsv4_kernels.norm.reference import rms_norm
from dsv4_kernels.norm.triton import rms_norm_fp8
from dsv4_kernels.out_proj.triton import grouped_out_proj
from dsv4serve.config import Numerics
from dsv4serve.memory import CacheLayout, CachePools
from dsv4serve.model.attention import Attention
from dsv4serve.model.block import HyperConnection
from dsv4serve.model.device import DeviceAttention, DeviceBlock, DeviceTransformer, Streams
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.runner.device_batch import INTEGERS
from dsv4serve.runner.device_runner import DeviceRunner
from dsv4serve.runner.device_step import PagedDeviceStep
from dsv4serve.runner.graphs import Bucket
from dsv4serve.runner.paged import PagedStep
from dsv4serve.types import PAGE_TOKENS, Request, RequestOutput

LAYER_BOUND = 1e-2  # one sublayer, the same input
STEP_BOUND = 5e-2  # all layers
Bounds = tuple[float, float]  # of a step's logits (median row), and of the cache rows that it wrote (all of a layer)
NEAR_TIE = 0.5  # logits of deviation 2: a greedy token may be another one that the reference likes as much but for this


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def median_row(found: Tensor, expected: Tensor) -> float:
    """The middle one of the rows' relative errors."""
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@torch.inference_mode()
def check_layers(reference: Transformer, network: DeviceTransformer, length: int) -> None:
    """Every sublayer of a prefill of one sequence, given the reference's input of that sublayer."""
    config, device = reference.config, network.device
    ids = torch.tensor(random_ids(config, length, 1))
    seen: dict[str, Tensor] = {}
    reference(ids, WholeSequence(length, seen.__setitem__))
    cache = Cache(CacheLayout.build(config, Numerics.OFFICIAL), device)
    rows = Rows.build(*(torch.tensor([value], dtype=torch.int32, device=device) for value in (1, 0, length)), length)
    step = PagedDeviceStep(cache.pools, rows, cache.page_table)
    streams = seen["embedding"].contiguous()
    for ours, theirs in zip(network.blocks, reference.blocks, strict=True):
        x, post, comb = theirs._enter(streams, theirs.attn_hc, theirs.attn_norm)
        _, *found = _boundary(ours, Streams(streams.to(device)), ours.attn_hc, ours.attn_norm)
        for one, other in zip(found, (x, post, comb), strict=True):
            assert relative(one, other) <= LAYER_BOUND
        output = seen[f"{theirs.prefix}attn.output"]
        _check_attention(ours.attention, theirs.attention, x, seen, step)
        before = Streams(*(value.to(device) for value in (streams, output, post, comb)))
        streams = mhc_post(output, streams, post, comb)
        x, post, comb = theirs._enter(streams, theirs.ffn_hc, theirs.ffn_norm)
        found = _boundary(ours, before, ours.ffn_hc, ours.ffn_norm)
        for one, other in zip(found, (streams, x, post, comb), strict=True):
            assert relative(one, other) <= LAYER_BOUND
        output, x = seen[f"{theirs.prefix}ffn.output"], x.to(device)
        found = ours.moe(x, quantize_rows(x), ids.to(device), step).float().sum(1)
        assert relative(found, output) <= LAYER_BOUND, theirs.prefix
        before = Streams(*(value.to(device) for value in (streams, output, post, comb)))
        streams = seen[f"{theirs.prefix}streams"].contiguous()
    assert relative(network.logits(before), reference.logits(streams)) <= LAYER_BOUND


@torch.inference_mode()
def check_mtp(
    reference: Transformer,
    network: DeviceTransformer,
    tokens: Sequence[int],
    bounds: Bounds = (2 * LAYER_BOUND, 2 * LAYER_BOUND),
) -> None:
    """The MTP block over one sequence, given the reference's streams; then its keys alone, which are the same."""
    config, device = reference.config, network.device
    ids, length = torch.tensor(tokens), len(tokens)
    streams = reference(ids, WholeSequence(length))[:-1].contiguous()
    assert reference.mtp is not None
    assert network.mtp is not None
    expected, expected_logits = reference.mtp(streams, ids[1:], WholeSequence(length - 1))
    rings = []
    given = streams.to(device), ids[1:].to(device)
    for run in (network.mtp.advance, network.mtp.keep):
        cache = Cache(CacheLayout.build(config, Numerics.OFFICIAL, 1), device)
        arrays = (torch.tensor([value], dtype=torch.int32, device=device) for value in (1, 0, length - 1))
        found = run(*given, PagedDeviceStep(cache.pools, Rows.build(*arrays, length - 1), cache.page_table))
        layer = cache.pools.layers[-1]
        rings.append(decode(tuple(plane.cpu() for plane in layer.window), layer.layout.window).float())
        if found is not None:
            after, x = network.mtp.head.collapse(found)
            assert relative(after, expected) <= bounds[0]
            assert median_row(network.mtp.head.logits(x), expected_logits) <= bounds[0]
    assert rows_error(*rings) <= bounds[1]


def _check_attention(
    ours: DeviceAttention, theirs: Attention, x: Tensor, seen: dict[str, Tensor], step: PagedDeviceStep
) -> None:
    """Each operation given the reference's input; all of them in the interpreter only, which adds FP8 products exactly:
    the 14 bits of a tensor core's sums move E4M3 roundings, and a random network makes 2 to 8 % of that."""
    rank, eps = ours.config.q_lora_rank, ours.config.rms_norm_eps
    device, rows = ours.q_norm.device, quantize_rows(x.to(ours.q_norm.device))
    latent = linear(x, theirs.w_latent, quantize=True)
    assert relative(linear_fp8(rows, ours.w_latent), latent) <= LAYER_BOUND, theirs.names
    given = latent.to(device)
    queries = linear(rms_norm(latent[:, :rank], theirs.q_norm, eps), theirs.w_query, quantize=True)
    found = linear_fp8(rms_norm_fp8(given[:, :rank], ours.q_norm, eps), ours.w_query)
    assert relative(found, queries) <= LAYER_BOUND, theirs.names
    raw = None if ours.w_raw is None else linear_bf16(x.to(device), ours.w_raw)
    attended, output = (seen[theirs.names[part]] for part in ("attend", "output"))
    step.prepare(ours, given, raw)
    found = step.attend(ours, queries.to(device), raw)
    assert relative(found, attended) <= LAYER_BOUND, theirs.names
    assert relative(grouped_out_proj(attended.to(device), ours.wo_a, ours.wo_b), output) <= LAYER_BOUND, theirs.names
    if device.type == "cpu":
        assert relative(ours(x.to(device), rows, step), output) <= LAYER_BOUND, theirs.names


def _boundary(block: DeviceBlock, rows: Streams, hc: HyperConnection, norm: Tensor) -> tuple[Tensor, ...]:
    """Streams, x, post and comb; what x is in E4M3 is what it quantises to."""
    streams, x, x_fp8, post, comb = block._boundary(rows, hc, norm)
    expected = quantize_rows(x)
    assert torch.equal(x_fp8.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(x_fp8.exponents, expected.exponents)
    return streams, x, post, comb


class Cache:
    """Pools of four slots and eight pages with a page table, poisoned: byte 255 is NaN in every format."""

    def __init__(self, layout: CacheLayout, device: torch.device | str) -> None:
        self.pools = CachePools(layout, 4, 8, 1, device)
        table = torch.tensor([[3, 6], [5, 0], [1, 7], [4, 2]], dtype=torch.int32)
        self.page_table = table.to(device)
        for layer in self.pools.layers:
            for plane in _planes(layer):
                plane[:-1].fill_(255)  # masked reads of the CPU engine land in the last row
            if layer.c128_state is not None:
                layer.c128_state.fill_(torch.nan)

    def copy(self, other: Cache) -> None:
        """Take over the bytes of another cache."""
        for own, given in zip(self.pools.layers, other.pools.layers, strict=True):
            for target, source in zip(_planes(own), _planes(given), strict=True):
                target.copy_(source)
            if own.c128_state is not None:
                own.c128_state.copy_(given.c128_state)


def _planes(layer) -> list[Tensor]:
    groups = (layer.window, layer.c4_state, layer.index_state, layer.entries, layer.index)
    return [plane for planes in groups if planes for plane in planes]


@dataclass
class Sequences:
    """The same requests on both engines: their slots, and how many of each one's tokens are computed.

    With room for drafts a request with no more rows than a verify can have is one, and all of its drafts are accepted.
    """

    reference: Transformer
    network: DeviceTransformer
    ids: dict[int, list[int]]  # by slot
    num_draft_tokens: int = 0
    computed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = CacheLayout.build(self.reference.config, Numerics.OFFICIAL, self.num_draft_tokens)
        self.expected, self.found = Cache(layout, "cpu"), Cache(layout, self.network.device)
        self.computed = dict.fromkeys(self.ids, 0)

    def _take(self, counts: dict[int, int]) -> list[int]:
        return [token for slot, count in counts.items() for token in self.ids[slot][self.computed[slot] :][:count]]

    @torch.inference_mode()
    def advance_reference(self, counts: dict[int, int]) -> Tensor:
        """Logits of all rows of a step with counts[slot] tokens of each of its slots, on CPU."""
        slots = list(counts)
        metadata = StepMetadata(
            slots=slots,
            starts=[self.computed[slot] for slot in slots],
            counts=list(counts.values()),
            page_table=self.expected.page_table[slots].numpy().astype(np.int64),
            page_tokens=PAGE_TOKENS,
            c4_ring_rows=self.expected.pools.layout.c4_ring_rows,
            drafts=[count - 1 if count <= 1 + self.num_draft_tokens else 0 for count in counts.values()],
            c128_banks=self.expected.pools.layout.c128_banks,
        )
        streams = self.reference(torch.tensor(self._take(counts)), PagedStep(self.expected.pools, metadata))
        return self.reference.logits(streams)

    @torch.inference_mode()
    def advance_device(self, counts: dict[int, int], num_rows: int) -> Tensor:
        """The same on the device, in a bucket of `num_rows`."""
        device = self.network.device
        starts = [self.computed[slot] for slot in counts]
        arrays = (list(counts), starts, list(counts.values()))
        rows = Rows.build(*(torch.tensor(array, dtype=torch.int32, device=device) for array in arrays), num_rows)
        ids = torch.zeros(num_rows, dtype=torch.int64)
        ids[: sum(counts.values())] = torch.tensor(self._take(counts))
        fits_rings = max(counts.values()) <= 1 + self.num_draft_tokens
        step = PagedDeviceStep(self.found.pools, rows, self.found.page_table, fits_rings=fits_rings)
        streams = self.network(ids.to(device), step)
        return self.network.logits(streams[: sum(counts.values())])

    def prefill(self, counts: dict[int, int]) -> None:
        """Compute tokens on CPU alone; the device gets the cache."""
        self.advance_reference(counts)
        self.found.copy(self.expected)
        self._count(counts)

    def check_step(
        self,
        counts: dict[int, int],
        num_rows: int,
        bounds: Bounds = (STEP_BOUND, STEP_BOUND),
        times: int = 1,
    ) -> None:
        """The same step on both, so many times: logits of all rows, and what lies in the cache afterwards, but for the
        padding of scales."""
        logits: list[tuple[Tensor, Tensor]] = []
        for _ in range(times):
            expected = self.advance_reference(counts)
            logits.append((self.advance_device(counts, num_rows), expected))
            for one, other in cache_rows(self.found, self.expected):
                error = rows_error(one, other)
                assert error <= bounds[1], error
            self._count(counts)
        error = median_row(*(torch.cat(rows) for rows in zip(*logits, strict=True)))
        assert error <= bounds[0], error

    def _count(self, counts: dict[int, int]) -> None:
        for slot, count in counts.items():
            self.computed[slot] += count
        verifies = {slot: count - 1 for slot, count in counts.items() if count <= 1 + self.num_draft_tokens}
        slots, accepted = torch.tensor(list(verifies)), torch.tensor(list(verifies.values()))
        for cache in (self.expected, self.found):
            device = cache.page_table.device
            cache.pools.commit(slots.to(device).long(), accepted.to(device).long())


def rounded(reference: Transformer, params: Mapping[str, Tensor], seed: int = 1) -> Transformer:
    """The reference with each value of its embeddings moved by about one BF16 rounding."""
    draw = torch.Generator().manual_seed(seed)
    embedding = params["embed.weight"]
    moved = (embedding * (1 + torch.randn(embedding.shape, generator=draw) * 2**-9)).bfloat16().float()
    return Transformer(reference.config, {**params, "embed.weight": moved}, Numerics.OFFICIAL)


def cache_rows(found: Cache, expected: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """Values of everything that both hold."""
    for own, given in zip(found.pools.layers, expected.pools.layers, strict=True):
        layout = own.layout
        pairs = [(layout.window, own.window, given.window), (layout.entry, own.entries, given.entries)]
        pairs += [(layout.index, own.index, given.index), (layout.c4_state, own.c4_state, given.c4_state)]
        pairs += [(layout.index_state, own.index_state, given.index_state)]
        for row_format, one, other in pairs:
            if row_format is not None:
                rows = (decode(tuple(p.cpu() for p in planes), row_format).float() for planes in (one, other))
                yield next(rows), next(rows)
        if own.c128_state is not None:
            yield own.c128_state[:, :, 2].cpu(), given.c128_state[:, :, 2]


def rows_error(found: Tensor, expected: Tensor) -> float:
    """Relative error; rows that nobody wrote must be NaN on both sides."""
    assert torch.equal(found.isnan(), expected.isnan())
    written = ~expected.isnan().any(-1)
    return relative(found[written], expected[written]) if bool(expected[written].any()) else 0.0


@torch.inference_mode()
def rounding_noise(reference: Transformer, params: Mapping[str, Tensor], ids: Sequence[int]) -> Bounds:
    """What the reference itself makes of one BF16 rounding of its embeddings."""
    caches, logits = [], []
    for one in (rounded(reference, params), reference):
        caches.append(Cache(CacheLayout.build(reference.config, Numerics.OFFICIAL), "cpu"))
        table = caches[-1].page_table[:1].numpy().astype(np.int64)
        metadata = StepMetadata(slots=[0], starts=[0], counts=[len(ids)], page_table=table, page_tokens=PAGE_TOKENS)
        logits.append(one.logits(one(torch.tensor(ids), PagedStep(caches[-1].pools, metadata))))
    return median_row(*logits), max(rows_error(*rows) for rows in cache_rows(*caches))


def check_generation(
    reference: Transformer, requests: list[Request], outputs: dict[str, RequestOutput], near_tie: float = NEAR_TIE
) -> None:
    """Greedy tokens are the reference's on the same history, but for near ties."""
    for request in requests:
        output = outputs[request.request_id]
        assert len(output.token_ids) == request.sampling.max_tokens
        lost = regrets_of(reference, request, output)
        assert float(lost.max()) <= near_tie, (request.request_id, int(lost.argmax()), lost.tolist())


def regrets_of(reference: Transformer, request: Request, output: RequestOutput) -> Tensor:
    """How much less the reference likes each token of an output than its own choice, in logits."""
    tokens = output.token_ids
    expected = oracle_logits(reference, request.prompt_ids + tokens[:-1])[len(request.prompt_ids) - 1 :]
    return regrets(expected, tokens)


def regrets(expected: Tensor, tokens: Sequence[int]) -> Tensor:
    """The same of the reference's logits [tokens, vocab]."""
    return expected.max(-1).values - expected.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)


@torch.inference_mode()
def check_replay(runner: DeviceRunner, bucket: Bucket) -> None:
    """The bucket's last step again, by its graph and eagerly, from the same cache: all its bits."""
    graphs, forward = runner.graphs, runner.forward
    num_requests = int((graphs.inputs(bucket)[INTEGERS.index("count")] > 0).sum())
    assert num_requests
    state = [forward.left, runner.pools.streams]
    for layer in runner.pools.layers:
        state += _planes(layer) + ([] if layer.c128_state is None else [layer.c128_state])
    before = [tensor.clone() for tensor in state]
    results = []
    for run in (graphs.replay, graphs.eager):
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
        output = run(bucket)
        own = [output.tokens[:num_requests], output.logits[:num_requests], forward.left[:, :-1].contiguous()]
        own += [runner.pools.streams[:-1], *state[2:]]
        results.append([tensor.clone() for tensor in own])
    for tensor, saved in zip(state, before, strict=True):
        tensor.copy_(saved)  # the engine may go on
    for replayed, eager in zip(*results, strict=True):
        assert torch.equal(replayed.view(torch.uint8), eager.view(torch.uint8))
