"""Each C kernel against its torch reference on odd sizes; and the references run wherever the C kernels do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels import cpu, gemm, mega_moe, mhc, norm, out_proj, rope, router, sparse_attention
from dsv4_kernels.sparse_attention import Keys

BOUND = 2e-6  # relative norm; both sides are float32 with sums in different orders
DTYPES = [torch.float32, torch.bfloat16]  # of weights

Call = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # public, C, arguments


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Outputs and scratch memory start as NaN."""
    torch.use_deterministic_algorithms(True)  # which fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


def column(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random matrix [.., out, in] that lies column by column."""
    return (torch.randn(*shape[:-2], shape[-1], shape[-2]) * shape[-1] ** -0.5).to(dtype).mT


def make_linear(draw: random.Random, rows: int) -> Call:
    depth, width = draw.choice([1, 5, 96, 256]), draw.choice([2, 15, 24, 47, 130, 300])
    x = torch.randn(rows, depth + 3)[:, 1 : depth + 1]  # some columns of a matrix
    weight = column(width + 7, depth, dtype=draw.choice(DTYPES))[:width]
    return gemm.linear, gemm.cpu.linear, (x, weight), {}


def make_out_proj(draw: random.Random, rows: int) -> Call:
    groups, rank, heads, dim = draw.choice([1, 2, 3]), draw.choice([4, 40]), draw.choice([1, 2]), draw.choice([8, 24])
    o, dtype = torch.randn(rows, groups * heads, dim), draw.choice(DTYPES)
    weights = column(groups, rank, heads * dim, dtype=dtype), column(22, groups * rank, dtype=dtype)
    return out_proj.grouped_out_proj, out_proj.cpu.grouped_out_proj, (o, *weights), {"quantize": False}


def make_mhc_pre(draw: random.Random, rows: int) -> Call:
    num, hidden = draw.choice([1, 2, 3, 4]), draw.choice([2, 16, 40, 67])
    streams = (
        torch.randn(rows, num, hidden) if draw.random() < 0.7 else torch.randn(rows, 1, hidden).expand(-1, num, -1)
    )
    mixes = 2 * num + num * num
    inputs = streams, column(mixes, num * hidden), torch.randn(mixes), torch.randn(mixes)
    return mhc.mhc_pre, mhc.cpu.mhc_pre, inputs, {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


def make_mhc_post(draw: random.Random, rows: int) -> Call:
    num, hidden = draw.choice([1, 2, 3, 4]), draw.choice([2, 16, 40, 67])
    streams = (
        torch.randn(rows, num, hidden) if draw.random() < 0.7 else torch.randn(rows, 1, hidden).expand(-1, num, -1)
    )
    inputs = torch.randn(rows, hidden), streams, torch.randn(rows, num), torch.randn(rows, num, num)
    return mhc.mhc_post, mhc.cpu.mhc_post, inputs, {}


def make_mhc_head(draw: random.Random, rows: int) -> Call:
    num, hidden = draw.choice([1, 2, 3, 4]), draw.choice([2, 16, 40, 67])
    inputs = torch.randn(rows, num, hidden), column(num, num * hidden), torch.randn(num), torch.randn(1)
    return mhc.mhc_head, mhc.cpu.mhc_head, inputs, {"hc_eps": 1e-6, "norm_eps": 1e-6}


def make_mega_moe(draw: random.Random, rows: int) -> Call:
    experts, hidden, width = draw.choice([1, 3, 9]), draw.choice([5, 48, 72]), draw.choice([3, 16, 33])
    top_k, dtype = draw.randint(1, experts), draw.choice(DTYPES)
    ids = torch.rand(rows, experts).argsort(dim=1)[:, :top_k].contiguous()
    weights = column(experts, 2 * width, hidden, dtype=dtype), column(experts, hidden, width, dtype=dtype)
    shared = column(2 * width, hidden, dtype=dtype), column(hidden, width, dtype=dtype)
    inputs = torch.randn(rows, hidden) * 3, ids, torch.rand(rows, top_k), *weights, *shared
    return mega_moe.mega_moe, mega_moe.cpu.mega_moe, inputs, {"limit": 0.7, "activations": "bf16"}


def make_route(draw: random.Random, rows: int) -> Call:
    experts, hidden, vocab = draw.choice([2, 5, 16]), draw.choice([7, 64]), 11
    top_k = draw.randint(1, experts)
    table = torch.rand(vocab, experts).argsort(dim=1)[:, :top_k].contiguous()
    options = {
        "bias": draw.choice([None, torch.randn(experts)]),
        "tid2eid": draw.choice([None, table]),
        "token_ids": torch.randint(0, vocab, (rows,)),
        "top_k": top_k,
        "scale": 1.5,
    }
    return router.route, router.cpu.route, (torch.randn(rows, hidden) * 5, column(experts, hidden)), options


def make_rms_norm(draw: random.Random, rows: int) -> Call:
    dim = draw.choice([1, 16, 37, 128])
    x = draw.choice([torch.randn(rows, dim + 5)[:, 2 : dim + 2], torch.randn(rows, 3, dim)])
    return norm.rms_norm, norm.cpu.rms_norm, (x, draw.choice([None, torch.randn(dim)]), 1e-6), {}


def make_head_norm(draw: random.Random, rows: int) -> Call:
    return norm.head_norm, norm.cpu.head_norm, (torch.randn(rows, draw.choice([1, 6]), draw.choice([20, 64])), 1e-6), {}


def make_apply_rope(draw: random.Random, rows: int) -> Call:
    half, rest, heads = draw.choice([1, 4, 32]), draw.choice([0, 6, 64]), draw.choice([1, 3])
    x = torch.randn(rows, heads * (2 * half + rest) + 4)[:, 4:]
    x = draw.choice([x, x.unflatten(1, (heads, -1))])
    rotations = torch.polar(torch.ones(rows, half), torch.randn(rows, half))
    return rope.apply_rope, rope.cpu.apply_rope, (x, rotations), {"inverse": draw.random() < 0.5}


def make_sparse_attention(draw: random.Random, rows: int) -> Call:
    heads, dim, half = draw.choice([1, 3, 4, 9]), draw.choice([16, 48, 128]), draw.choice([2, 8])
    sources = []
    for width in draw.choice([(6,), (17, 1), (40, 23), (3, 0)]):
        values = torch.randn(50, dim)
        values[10:20] = torch.nan  # rows of other requests: no table names them
        values[-1] = 0.0
        table = torch.randint(20, 49, (rows, width))
        table[torch.rand(rows, width) < 0.4] = -1
        sources.append(Keys(table, lambda rows, values=values: values[rows], values))
    q = torch.randn(rows, heads * dim + 8)[:, 8:].unflatten(1, (heads, dim))
    rotations = torch.polar(torch.ones(rows, half), torch.randn(rows, half))
    inputs = q, sources, torch.randn(heads), rotations
    return sparse_attention.sparse_attention, sparse_attention.cpu.sparse_attention, inputs, {}


MAKERS = [
    make_apply_rope,
    make_head_norm,
    make_linear,
    make_mega_moe,
    make_mhc_head,
    make_mhc_post,
    make_mhc_pre,
    make_out_proj,
    make_rms_norm,
    make_route,
    make_sparse_attention,
]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def taken(kernel: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    result = kernel(*args, **options)
    assert result is not None, "the C kernel does not take these arguments"
    return tensors(result)


def test_the_library_is_built() -> None:
    """`make` installs it; after a change of csrc/ it has to be built again."""
    assert cpu.library is not None


@torch.inference_mode()
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 21])
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_equals_the_reference(make: Callable[..., Call], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        public, kernel, args, options = make(random.Random(seed), rows)
        found = taken(kernel, args, options)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "library", None)
            expected = tensors(public(*args, **options))
        for actual, value in zip(found, expected, strict=True):
            assert (actual.shape, actual.dtype) == (value.shape, value.dtype)
            if value.dtype is torch.int64:
                assert torch.equal(actual, value)
            else:
                error = (actual - value).norm()
                assert error <= BOUND * value.norm(), f"seed {seed}: {error / value.norm():.1e}"


@torch.inference_mode()
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_a_row_does_not_depend_on_the_rows_beside_it(make: Callable[..., Call]) -> None:
    """Bit for bit: what a request gets must not change with who else is in the step."""
    num_rows = 19
    for seed in range(6):
        torch.manual_seed(seed)
        _, kernel, args, options = make(random.Random(seed), num_rows)
        whole = taken(kernel, args, options)
        for first, last in ((0, 1), (4, 6), (7, 10), (11, 19)):
            part = taken(kernel, *some_rows(args, options, num_rows, slice(first, last)))
            for some, all_rows in zip(part, whole, strict=True):
                assert torch.equal(some, all_rows[first:last])


def some_rows(args: tuple[Any, ...], options: dict[str, Any], num_rows: int, rows: slice) -> tuple[Any, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [Keys(keys.table[rows], keys.read, keys.values) for keys in value]
        return value[rows] if isinstance(value, Tensor) and value.shape[0] == num_rows else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in options.items()}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_the_reference_runs_where_the_kernel_cannot(make: Callable[..., Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, with bfloat16 activations, and without the library."""

    class Forbidden:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} was called")

    torch.manual_seed(0)
    public, _, args, options = make(random.Random(0), 5)
    monkeypatch.setattr(cpu, "library", Forbidden())
    with_gradients = tensors(public(*args, **options))
    low = args[0].bfloat16(), *(x.bfloat16() if make is make_mhc_post and x.dim() == 3 else x for x in args[1:])
    with torch.inference_mode():
        assert tensors(public(*low, **options))[0].shape == with_gradients[0].shape
        monkeypatch.setattr(cpu, "library", None)
        for found, expected in zip(tensors(public(*args, **options)), with_gradients, strict=True):
            torch.testing.assert_close(found, expected)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 65])
def test_weights_in_bfloat16_give_the_same_bits(rows: int) -> None:
    """So a server may keep them so, and rows do not depend on how many share a read of the weights."""
    for seed in range(8):
        torch.manual_seed(seed)
        depth, width = random.Random(seed).choice([(67, 300), (300, 37), (128, 513), (5, 2)])
        x, weight = torch.randn(rows, depth), column(width, depth, dtype=torch.bfloat16)
        found = gemm.cpu.linear(x, weight)
        assert torch.equal(found, gemm.cpu.linear(x, weight.float()))
        assert torch.equal(found, torch.cat([gemm.cpu.linear(row, weight) for row in x.split(1)]))


@torch.inference_mode()
def test_many_rows_are_left_to_torch_when_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(cpu.FEW_ROWS + 1, 8), column(8, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert gemm.cpu.linear(x, weight) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert gemm.cpu.linear(x, weight) is None
    assert gemm.cpu.linear(x[1:], weight) is not None


@torch.inference_mode()
def test_nan_stays_nan() -> None:
    """A row with a NaN is NaN afterwards, its neighbours are not: the runner finds out whose it is."""
    torch.manual_seed(0)
    weights = column(3, 32, 24), column(3, 24, 16), column(32, 24), column(24, 16)
    x = torch.randn(5, 24)
    x[2, 7] = torch.nan
    gate, ids = router.route(
        x, column(3, 24), bias=None, tid2eid=None, token_ids=torch.zeros(5, dtype=torch.int64), top_k=2, scale=1.0
    )
    assert ((ids >= 0) & (ids < 3)).all()
    out = mega_moe.mega_moe(x, ids, gate, *weights, limit=10.0, activations="bf16")
    assert out.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    streams = torch.randn(3, 4, 20)
    streams[1, 2, 3] = torch.nan
    merged, post, comb = mhc.mhc_pre(
        streams, column(24, 80), torch.zeros(24), torch.ones(24), sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6
    )
    for result in (merged, post, comb):
        assert result.flatten(1).isnan().any(dim=1).tolist() == [False, True, False]
    values = torch.randn(9, 16)
    values[4] = torch.nan
    table = torch.tensor([[1, 2, -1], [3, 4, 5]])
    rotations = torch.ones(2, 4, dtype=torch.complex64)
    attended = sparse_attention.sparse_attention(
        torch.randn(2, 4, 16), [Keys(table, lambda rows: values[rows], values)], torch.zeros(4), rotations
    )
    assert attended.flatten(1).isnan().all(dim=1).tolist() == [False, True]
