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
NEAR_TIE = 0.5  # logits of deviation 2: a greedy token may be another one that the reference likes as much but for this


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def median_row(found: Tensor, expected: Tensor) -> float:
    """The middle one of the rows' relative errors."""
    return float(row_errors(found, expected).median())


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each row, float64 [rows]."""
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


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
    reference: Transformer, network: DeviceTransformer, tokens: Sequence[int], rounded: Sequence[Transformer] = ()
) -> None:
    """The MTP block over one sequence, given the reference's streams; then its keys alone, which are the same. Bounds
    are twice what the worst of the rounded networks (`roundings`) makes of the same streams, where there are any."""
    config, device = reference.config, network.device
    ids, length = torch.tensor(tokens), len(tokens)
    streams = reference(ids, WholeSequence(length))[:-1].contiguous()
    assert network.mtp is not None
    expected = _mtp_results(reference, streams, ids[1:])
    noise = [_mtp_errors(_mtp_results(one, streams, ids[1:]), expected) for one in rounded]
    bounds = [2 * max(each) for each in zip(*noise, strict=True)] or [2 * LAYER_BOUND] * 3
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
            assert relative(after, expected[0]) <= bounds[0]
            assert median_row(network.mtp.head.logits(x), expected[1]) <= bounds[1]
    assert rows_error(*rings) <= bounds[2]


def _mtp_results(network: Transformer, streams: Tensor, next_ids: Tensor) -> tuple[Tensor, ...]:
    """Streams, logits and keys of the MTP block over one sequence."""
    assert network.mtp is not None
    length = len(next_ids)
    keys = network.mtp.keys(streams, next_ids, WholeSequence(length))
    return *network.mtp(streams, next_ids, WholeSequence(length)), keys


def _mtp_errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Of streams, logits (the middle row) and keys."""
    return relative(found[0], expected[0]), median_row(found[1], expected[1]), relative(found[2], expected[2])


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
    """The same requests on both engines: their slots, and how many of each one's tokens are computed. The other engine
    is a device's, or the CPU's with another network.

    With room for drafts a request with no more rows than a verify can have is one, and all of its drafts are accepted.
    """

    reference: Transformer
    network: DeviceTransformer | Transformer
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
    def advance(self, network: Transformer, cache: Cache, counts: dict[int, int]) -> Tensor:
        """Logits of all rows of a step with counts[slot] tokens of each of its slots, on CPU."""
        slots = list(counts)
        metadata = StepMetadata(
            slots=slots,
            starts=[self.computed[slot] for slot in slots],
            counts=list(counts.values()),
            page_table=cache.page_table[slots].numpy().astype(np.int64),
            page_tokens=PAGE_TOKENS,
            c4_ring_rows=cache.pools.layout.c4_ring_rows,
            drafts=[count - 1 if count <= 1 + self.num_draft_tokens else 0 for count in counts.values()],
            c128_banks=cache.pools.layout.c128_banks,
        )
        return network.logits(network(torch.tensor(self._take(counts)), PagedStep(cache.pools, metadata)))

    @torch.inference_mode()
    def advance_device(self, counts: dict[int, int], num_rows: int) -> Tensor:
        """The same of the other engine; on a device in a bucket of `num_rows`."""
        if isinstance(self.network, Transformer):
            return self.advance(self.network, self.found, counts)
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
        """Compute tokens by the reference alone; the other engine gets the cache."""
        self.advance(self.reference, self.expected, counts)
        self.found.copy(self.expected)
        self._count(counts)

    def compare_step(self, counts: dict[int, int], num_rows: int, times: int = 1) -> dict[str, float]:
        """The same step on both, so many times: errors of the logits of all rows, the middle and the worst one, and of
        what lies in each pool of the cache afterwards, but for the padding of scales."""
        logits: list[tuple[Tensor, Tensor]] = []
        errors: dict[str, float] = {}
        for _ in range(times):
            expected = self.advance(self.reference, self.expected, counts)
            logits.append((self.advance_device(counts, num_rows), expected))
            for name, one, other in cache_rows(self.found, self.expected):
                errors[name] = max(errors.get(name, 0.0), rows_error(one, other))
            self._count(counts)
        each = row_errors(*(torch.cat(rows) for rows in zip(*logits, strict=True)))
        return {**errors, "median row": float(each.median()), "worst row": float(each.max())}

    def check_step(self, counts: dict[int, int], num_rows: int) -> None:
        """All but the worst row within the bound of a random network."""
        errors = self.compare_step(counts, num_rows)
        assert all(error <= STEP_BOUND for name, error in errors.items() if name != "worst row"), errors

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


def roundings(reference: Transformer, params: Mapping[str, Tensor]) -> list[Transformer]:
    """The reference with eight roundings of its embeddings. Of stories 24 others have no error beyond twice the worst
    of these; with three, one in ten would."""
    return [rounded(reference, params, seed) for seed in range(8)]


def cache_rows(found: Cache, expected: Cache) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Values of everything that both hold, by pool."""
    for index, (own, given) in enumerate(zip(found.pools.layers, expected.pools.layers, strict=True)):
        layout = own.layout
        formats = {"window": layout.window, "entries": layout.entry, "index": layout.index}
        formats |= {"c4_state": layout.c4_state, "index_state": layout.index_state}
        for name, row_format in formats.items():
            if row_format is not None:
                planes = getattr(own, name), getattr(given, name)
                one, other = (decode(tuple(p.cpu() for p in each), row_format).float() for each in planes)
                yield f"layer {index} {name}", one, other
        if own.c128_state is not None:
            yield f"layer {index} c128_state", own.c128_state[:, :, 2].cpu(), given.c128_state[:, :, 2]


def rows_error(found: Tensor, expected: Tensor) -> float:
    """Relative error; rows that nobody wrote must be NaN on both sides."""
    assert torch.equal(found.isnan(), expected.isnan())
    written = ~expected.isnan().any(-1)
    return relative(found[written], expected[written]) if bool(expected[written].any()) else 0.0


@dataclass
class JudgedSequences:
    """`Sequences` whose steps the CPU also runs with its embeddings rounded.

    What a network makes of a rounding depends on the rows, and few rows are chance. So each error of a step may be
    twice what the worst of the rounded networks has in this step, over the same cache."""

    device: Sequences
    rounded: list[Sequences]

    @classmethod
    def build(
        cls,
        reference: Transformer,
        network: DeviceTransformer | Transformer,
        rounded: list[Transformer],
        ids: dict[int, list[int]],
        num_draft_tokens: int = 0,
    ) -> JudgedSequences:
        """`rounded`: see `roundings`."""
        device, *others = (Sequences(reference, one, ids, num_draft_tokens) for one in (network, *rounded))
        return cls(device, others)

    def prefill(self, counts: dict[int, int]) -> None:
        for sequences in (self.device, *self.rounded):
            sequences.prefill(counts)

    def check_step(self, counts: dict[int, int], num_rows: int, times: int = 1) -> None:
        noise = [sequences.compare_step(counts, num_rows, times) for sequences in self.rounded]
        errors = self.device.compare_step(counts, num_rows, times)
        bounds = {name: 2 * max(each[name] for each in noise) for name in errors}
        beyond = {name: (error, bounds[name]) for name, error in errors.items() if error > bounds[name]}
        assert not beyond, beyond


def check_judged(
    reference: Transformer,
    rounded: Sequence[Transformer],
    requests: list[Request],
    outputs: dict[str, RequestOutput],
) -> None:
    """Greedy tokens are the reference's on the same history but for near ties: a token in place of its choice is behind
    that by at most twice what the worst of the rounded networks (`roundings`) moves this distance."""
    for request in requests:
        tokens = outputs[request.request_id].token_ids
        assert len(tokens) == request.sampling.max_tokens
        logits = [
            oracle_logits(one, request.prompt_ids + tokens[:-1])[len(request.prompt_ids) - 1 :]
            for one in (reference, *rounded)
        ]
        best = logits[0].argmax(-1, keepdim=True)
        chosen = torch.tensor(tokens).unsqueeze(1)
        lost, *others = ((each.gather(1, best) - each.gather(1, chosen)).squeeze(1) for each in logits)
        bounds = 2 * torch.stack([(other - lost).abs() for other in others]).amax(0)
        beyond = (lost > bounds).nonzero().flatten().tolist()
        assert not beyond, (request.request_id, beyond, lost.tolist(), bounds.tolist())


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
