"""What the device engine fuses, taken apart again: switches for ablation.py, made of patches and never of the product.

Each switch replaces functions where the network or the step looks them up, and computes the same with more launches:

| switch | in place of | runs |
|---|---|---|
| `mhc` | `mhc_boundary`, `mhc_head` | the references of mhc, norm and quant: a launch for each torch operation |
| `compressor` | the compressors of `prepare_rows` | the reference's chain: gather, pool, norm, RoPE, round, store |
| `launches` | what shares a launch (ADR 7) | the same Triton kernels, each in a launch of its own, see `_launches` |
| `bf16-experts` | FP8 activations of the routed experts | BF16 activations, W4A16, with weights of the form `bf16` |
| `early-launches` | kernels launched before the one ahead ends (ADR 9) | the same, one after the other; compiled anew |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import plain_compressor
import torch
from torch import Tensor

from dsv4_kernels import dependent
from dsv4_kernels.compressor.triton import C4Compressor, C128Compressor, compress_c4, compress_c128
from dsv4_kernels.gemm import library, pair
from dsv4_kernels.gemm import triton as gemm
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.indexer import triton as indexer
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.kv_store import Planes
from dsv4_kernels.kv_store.triton import prepare_q, store_kv
from dsv4_kernels.mega_moe.combine import combine
from dsv4_kernels.mega_moe.shared import shared_expert
from dsv4_kernels.mega_moe.triton import pair_outputs
from dsv4_kernels.mega_moe.weights import Fp4Weight
from dsv4_kernels.metadata import C4, Rows
from dsv4_kernels.mhc import reference as mhc
from dsv4_kernels.norm.reference import rms_norm as plain_norm
from dsv4_kernels.norm.triton import rms_norm, rms_norm_fp8
from dsv4_kernels.out_proj.triton import LIBRARY_TOKENS
from dsv4_kernels.quant.reference import quantize_fp8
from dsv4_kernels.quant.triton import launch as quantize
from dsv4serve.model import device
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.runner import device_step

SWITCHES = ("mhc", "compressor", "launches", "bf16-experts", "early-launches")


@contextmanager
def unfused(off: Collection[str], network: DeviceTransformer, experts: Sequence[Experts] = ()) -> Iterator[None]:
    """Inside, the device engine computes without these of SWITCHES. Graphs captured before stay as they are.

    experts: of each block, in the form `bf16`, which `bf16-experts` needs if the network's have another.
    """
    with ExitStack() as stack:

        def replace(module: object, **functions: Any) -> None:
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(module, name, function))

        if "launches" in off:
            _launches(replace, network)
        if "mhc" in off:
            replace(device, mhc_boundary=_boundary, mhc_head=_head)
        if "launches" in off or "compressor" in off:
            replace(device_step, prepare_rows=_prepare_rows("launches" in off, "compressor" in off))
            replace(pair, FEW=0)  # nor few rows' queries with their compressors in one launch
        if "early-launches" in off:
            replace(dependent, ENABLED=False)
        others = {id(block.moe.w13): each for block, each in zip(network.blocks, experts, strict=bool(experts))}
        _moe(replace, "launches" in off, "bf16-experts" in off, others)
        yield


Replace = Callable[..., None]
Experts = tuple[Fp4Weight, Fp4Weight]  # w13, w2 of a block


def _added(streams: Tensor, output: Tensor | None, post: Tensor | None, comb: Tensor | None) -> Tensor:
    """New streams, as `mhc_boundary` forms them."""
    if output is None:
        return streams
    if output.dim() == 3:
        output = output.float().sum(1).to(streams.dtype)
    return mhc.mhc_post(output, streams, post, comb)


def _boundary(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    output: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Fp8Rows, Tensor, Tensor]:
    streams = _added(streams, output, post, comb)
    sizes = {"sinkhorn_iters": sinkhorn_iters, "hc_eps": hc_eps, "norm_eps": norm_eps}
    merged, post, comb = mhc.mhc_pre(streams, fn, base, scale, **sizes)
    x = plain_norm(merged, norm, norm_eps)
    codes, exponents = quantize_fp8(x, GROUP)
    # As the products are compiled to read them: exponents of a group are neighbours over the rows.
    return streams, x, Fp8Rows(codes, exponents.t().contiguous().t()), post, comb


def _head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    output: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    streams = _added(streams, output, post, comb)
    merged = mhc.mhc_head(streams, fn, base, scale, hc_eps=hc_eps, norm_eps=norm_eps)
    return streams, plain_norm(merged, norm, norm_eps)


def _norm_fp8(x: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """`rms_norm_fp8` in two launches."""
    return quantize_rows(rms_norm(x, weight, eps))


def _prepare_rows(separate: bool, plain: bool) -> Callable[..., Fp8Rows]:
    """`prepare_rows` in a launch for each operation. `separate`: also for each C4 compressor, and for the norm and the
    rounding of the query latent. `plain`: compressors as chains of torch operations."""
    norm = _norm_fp8 if separate else rms_norm_fp8
    of_c4, of_c128 = compress_c4, compress_c128
    if plain:
        of_c4, of_c128 = plain_compressor.compress_c4, plain_compressor.compress_c128

    def compress(compressors: Sequence[C4Compressor] | C128Compressor, *rest: Any) -> None:
        if isinstance(compressors, C128Compressor):
            raw, ape, gain = compressors.raw, compressors.ape, compressors.norm
            of_c128(raw, ape, gain, *rest, compressors.state, compressors.planes, compressors.row_format)
        else:
            for group in [(each,) for each in compressors] if separate else [compressors]:
                of_c4(group, *rest)

    def prepare_rows(
        query: Tensor,
        query_norm: Tensor,
        kv: Tensor,
        kv_norm: Tensor,
        eps: float,
        turns: Tensor,
        rows: Rows,
        step_planes: Planes,
        ring_planes: Planes,
        ring_rows: int,
        window: int,
        compressors: Sequence[C4Compressor] | C128Compressor,
        rotations: Tensor,
        page_table: Tensor,
        page_tokens: int,
    ) -> Fp8Rows:
        store_kv(kv, kv_norm, eps, turns, rows, step_planes, ring_planes, ring_rows, window)
        compress(compressors, eps, rotations, rows, page_table, page_tokens)
        return norm(query, query_norm, eps)

    return prepare_rows


class _Columns:
    """Products over one input that are not one matrix, read by the columns that they would have there."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        first = place[1].start or 0
        for part in self.parts:
            if first == 0:
                return part
            first -= part.shape[1]
        raise IndexError(place)


def _launches(replace: Replace, network: DeviceTransformer) -> None:
    """Apart again: latent and raw products; rounding between both output products; products of the index, which are
    stacked under those of attention; the queries of attention and index; index scores and top-k. And what
    `_prepare_rows` takes apart."""
    splits: dict[int, list[Any]] = {}  # by id of the whole weight
    for block in network.blocks:
        attention, config = block.attention, network.config
        if attention.ratio == C4:
            query, raw, heads = attention.w_query, attention.w_raw, config.num_attention_heads * config.head_dim
            parts = (slice(heads), slice(heads, None))
            blocks = (slice(heads // GROUP), slice(heads // GROUP, None))
            splits[id(query)] = [
                Fp8Weight(query.codes[rows], query.exponents[scales])
                for rows, scales in zip(parts, blocks, strict=True)
            ]
            widths = [4 * config.head_dim, 4 * config.index_head_dim, config.index_n_heads]
            splits[id(raw)] = list(raw.split(widths))

    def product(multiply: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Any]:
        def run(x: Any, weight: Any) -> Any:
            if id(weight) not in splits:
                return multiply(x, weight)
            return _Columns([multiply(x, part) for part in splits[id(weight)]])

        return run

    whole_out_proj = device.grouped_out_proj

    def out_proj(o: Tensor, wo_a: Fp8Weight, wo_b: Fp8Weight) -> Tensor:
        if len(o) >= LIBRARY_TOKENS and library.is_for_library(o):
            return whole_out_proj(o, wo_a, wo_b)  # which rounds in a launch of its own
        num_rows, depth = wo_a.codes.shape
        num_groups = o.shape[1] * o.shape[2] // depth
        low = torch.empty(len(o), num_rows, dtype=o.dtype, device=o.device)
        gemm.launch("wide", o.flatten(1), None, wo_a.codes, wo_a.exponents, num_groups, low, None)
        return library.linear_fp8(quantize_rows(low), wo_b)

    def queries(both: _Columns, num_heads: int, head_dim: int, eps: float, weights: Tensor, scale: float,
                rotations: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        heads, index = both.parts
        q = prepare_q(heads.unflatten(1, (num_heads, head_dim)), eps, rotations, rows)
        return q, *prepare_queries(index, 0, head_dim, eps, weights, scale, rotations, rows)[1:]

    linear_fp8, linear_bf16 = product(device.linear_fp8), product(device.linear_bf16)

    def linear_pair(x_fp8: Fp8Rows, weight: Fp8Weight, x: Tensor, matrix: Any, *_: Any) -> tuple[Any, Any, None]:
        return linear_fp8(x_fp8, weight), None if matrix is None else linear_bf16(x, matrix), None

    replace(device, linear_fp8=linear_fp8, linear_pair=linear_pair, grouped_out_proj=out_proj)
    replace(device_step, prepare_queries=queries, rms_norm_fp8=_norm_fp8)
    replace(indexer, ONE_LAUNCH_ROWS=0)


def _moe(replace: Replace, separate: bool, bf16: bool, others: dict[int, Experts]) -> None:
    """`separate`: x is rounded, tiles are filled, the shared expert runs and a token's parts are added in launches of
    their own. `bf16`: routed experts read x as it is; they are in `others`, by the id of a block's w13, or the block's
    own."""
    if not (separate or bf16):
        return
    fused_route, fused_parts = device.route, device.expert_parts
    seen: dict[str, Tensor] = {}  # of the layer that runs

    def route(x: Tensor, gate_weight: Tensor, *, tiles: Any, rounded: Tensor | None, **rest: Any) -> Any:
        if separate:
            tiles = None
            if rounded is not None and not bf16:
                quantize(x, rounded, None, GROUP, fp4=False)
        weights, ids = fused_route(x, gate_weight, tiles=tiles, rounded=None if separate or bf16 else rounded, **rest)
        seen.update(x=x, ids=ids)
        return weights, ids

    def expert_parts(
        inputs: Tensor,
        scales: Tensor,
        rows: Fp8Rows,
        weights: Tensor,
        tiles: Any,
        w13: Any,
        w2: Any,
        shared_w13: Fp8Weight,
        shared_w2: Fp8Weight,
        *,
        limit: float,
        activations: Any,
    ) -> Tensor:
        if bf16:
            inputs, scales, activations = seen["x"], seen["x"], "bf16"
            w13, w2 = others.get(id(w13), (w13, w2))
        rest = {"limit": limit, "activations": activations}
        if not separate:
            return fused_parts(inputs, scales, rows, weights, tiles, w13, w2, shared_w13, shared_w2, **rest)
        parts = pair_outputs(inputs, scales, seen["ids"], weights, w13, w2, **rest, tile_tokens=tiles.tile_tokens)
        shared = shared_expert(rows, shared_w13, shared_w2, limit=limit)
        return combine(parts.unflatten(0, weights.shape), shared, seen["ids"])

    replace(device, route=route, expert_parts=expert_parts)
