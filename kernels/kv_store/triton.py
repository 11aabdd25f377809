"""Window rows and queries in Triton: norm, RoPE, quantisation and the writes of a step, one launch each.

Equal to `rms_norm`, `head_norm`, `apply_rope` and `encode` (Format.KV_FP8) of the references, one after the other,
rounded at the same points.

A step stores its window rows in order into a workspace, the step rows, where its own attention reads them. The ring of
a slot gets them at once when they fit beside the rows that this step still reads (at most `room` of them), else by
`commit` after attention: see HistoryTable in kernels/metadata/reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.kv_store.device import prepare_row_heads, store_row
from dsv4_kernels.kv_store.reference import KV_GROUP, SCALE_ALIGN, Planes
from dsv4_kernels.metadata.rows import Rows

PROGRAM_HEADS = 8  # heads that one program prepares, two for each warp


@triton.jit
def _store(
    kv,  # bf16 [rows, DIM], stride kv_row
    weight,  # f32 [DIM]
    rotations,  # f32 [rows, 32, 2]
    slots,
    positions,
    counts,
    step_codes,  # the data plane as e4m3 [rows, data_bytes] and as bf16 [rows, data_bytes / 2]
    step_rope,
    step_scale,  # uint8 [rows, GROUPS]
    ring_codes,
    ring_rope,
    ring_scale,
    kv_row,
    ring_rows,
    room,
    eps,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    wait_for_previous()
    store_row(
        tl.program_id(0).to(tl.int64), kv, weight, rotations, slots, positions, counts, step_codes, step_rope,
        step_scale, ring_codes, ring_rope, ring_scale, kv_row, ring_rows, room, eps, DIM, GROUP, GROUPS,
    )  # fmt: skip


@triton.jit
def _commit(
    slots,
    positions,
    firsts,
    counts,
    step_data,  # planes as int32 words
    step_scale,
    ring_data,
    ring_scale,
    ring_rows,
    room,
    DATA: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    position, count = tl.load(positions + row), tl.load(counts + row)
    left = count - (row - tl.load(firsts + row))  # rows from this one to the request's last
    copied = (position >= 0) & (count > room) & (left <= ring_rows)
    target = tl.load(slots + row).to(tl.int64) * ring_rows + position % ring_rows
    word = tl.arange(0, BLOCK)
    keep = copied & (word < DATA)
    tl.store(ring_data + target * DATA + word, tl.load(step_data + row * DATA + word, mask=keep), mask=keep)
    keep = copied & (word < SCALE)
    tl.store(ring_scale + target * SCALE + word, tl.load(step_scale + row * SCALE + word, mask=keep), mask=keep)


@triton.jit
def _prepare_q(
    q,  # bf16 [rows, num_heads, DIM], stride q_row; heads are neighbours
    rotations,  # f32 [rows, 32, 2]
    positions,
    out,  # like q, stride out_row
    q_row,
    out_row,
    num_heads,
    eps,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    prepare_row_heads(
        q, rotations, positions, out, row, tl.program_id(1) * HEADS, num_heads, q_row, out_row, eps, DIM, ROPE, HEADS
    )


def ring_room(ring_rows: int, window: int) -> int:
    """Most rows of one request in a step that may enter its ring before the step's attention has read it."""
    return ring_rows - window + 1


def store_kv(
    latent_kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotations: Tensor,
    rows: Rows,
    step_planes: Planes,
    ring_planes: Planes,
    ring_rows: int,
    window: int,
) -> None:
    """Norm, rotate, quantise and store the window rows of a step (docs/model.md sections 4 and 9).

    Args:
        latent_kv: bf16 [T, head_dim], rows of any stride; norm_weight: f32 [head_dim].
        rotations: complex64 [T, 32] at the rows' positions.
        step_planes: uint8 [T or more, bytes], KV_FP8; row t receives row t.
        ring_planes: uint8 [slots * ring_rows, bytes], KV_FP8, which receive the rows of requests that have at most
            `ring_room` of them. The others wait for `commit`.
        ring_rows, window: rows of a slot's ring, at least `window`; positions that a row attends to.

    Raises ValueError for head sizes that are no multiple of 64 up to 512, or with other than 64 rotated dims.
    """
    arguments, sizes = store_arguments(
        latent_kv, norm_weight, eps, rotations, rows, step_planes, ring_planes, ring_rows, window
    )
    if latent_kv.shape[0]:
        _store[(latent_kv.shape[0],)](*arguments, **sizes, num_warps=1, launch_pdl=launches_early(latent_kv.device))


def store_arguments(
    latent_kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotations: Tensor,
    rows: Rows,
    step_planes: Planes,
    ring_planes: Planes,
    ring_rows: int,
    window: int,
) -> tuple[list[Tensor | int | float], dict[str, int]]:
    """Arguments of `_store`, checked, and its constants; those of `store_kv`."""
    dim = latent_kv.shape[1]
    check_dims(dim, rotations)
    arguments = [
        latent_kv,
        norm_weight,
        torch.view_as_real(rotations),
        rows.slots,
        rows.positions,
        rows.counts,
        *kv_views(step_planes),
        *kv_views(ring_planes),
        latent_kv.stride(0),
        ring_rows,
        ring_room(ring_rows, window),
        eps,
    ]
    return arguments, {"DIM": dim, "GROUP": KV_GROUP, "GROUPS": SCALE_ALIGN}


def commit(rows: Rows, step_planes: Planes, ring_planes: Planes, ring_rows: int, window: int) -> None:
    """Copy the last `ring_rows` step rows of every request that `store_kv` kept out of the ring. After attention.

    Without effect where no request has more rows than `ring_room`, which is at least one.
    """
    step_data, step_scale = (plane.view(torch.int32) for plane in step_planes)
    ring_data, ring_scale = (plane.view(torch.int32) for plane in ring_planes)
    words = step_data.shape[1]
    if rows.slots.shape[0]:
        _commit[(rows.slots.shape[0],)](
            rows.slots,
            rows.positions,
            rows.firsts,
            rows.counts,
            step_data,
            step_scale,
            ring_data,
            ring_scale,
            ring_rows,
            ring_room(ring_rows, window),
            DATA=words,
            SCALE=step_scale.shape[1],
            BLOCK=triton.next_power_of_2(words),
            num_warps=1,
            launch_pdl=launches_early(rows.slots.device),
        )


def prepare_q(q: Tensor, eps: float, rotations: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
    """RMS of each head in bf16 arithmetic, then RoPE (docs/model.md section 4).

    Args:
        q: bf16 [T, heads, head_dim], rows of any stride, heads of a row neighbours; rotations: complex64 [T, 32].
        out: like q; `q` itself when None.

    Returns `out`; its padding rows are as they were. Raises ValueError for head sizes that are no power of two.
    """
    num_rows, num_heads, dim = q.shape
    out = q if out is None else out
    if dim & (dim - 1) or q.stride()[1:] != (dim, 1) or out.stride()[1:] != (dim, 1):
        raise ValueError(f"prepare_q: q is {list(q.shape)}; expected neighbouring heads of a power of two dims")
    check_dims(dim, rotations)
    if num_rows:
        _prepare_q[(num_rows, triton.cdiv(num_heads, PROGRAM_HEADS))](
            q,
            torch.view_as_real(rotations),
            rows.positions,
            out,
            q.stride(0),
            out.stride(0),
            num_heads,
            eps,
            DIM=dim,
            ROPE=KV_GROUP,
            HEADS=PROGRAM_HEADS,
            num_warps=4,
            launch_pdl=launches_early(q.device),
        )
    return out


def kv_views(planes: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """The planes of KV_FP8 rows as e4m3 codes, as bf16 values and as scale bytes: all bytes of a row in each type."""
    data, scale = planes
    return data.view(torch.float8_e4m3fn), data.view(torch.bfloat16), scale


def check_dims(dim: int, rotations: Tensor) -> None:
    """Raise ValueError for head sizes that the kernels do not take."""
    if dim % KV_GROUP or dim > KV_GROUP * SCALE_ALIGN or 2 * rotations.shape[-1] != KV_GROUP:
        raise ValueError(
            f"kv_store: {dim} dims, {2 * rotations.shape[-1]} of them rotated; the Triton kernels take multiples of "
            f"{KV_GROUP} up to {KV_GROUP * SCALE_ALIGN}, {KV_GROUP} rotated"
        )
