"""Sparse attention against a float64 restatement, with masked, poisoned and absent keys."""

from __future__ import annotations

import pytest
import torch

from dsv4_kernels.rope import apply_rope, rope_frequencies, rope_table
from dsv4_kernels.sparse_attention import Keys, sparse_attention
from dsv4_kernels.sparse_attention import reference as attention_reference


def slow_attention(q: torch.Tensor, keys: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """One row: q [heads, d], keys [n, d]; softmax with one extra logit that has no value."""
    scores = q.double() @ keys.double().T / q.shape[-1] ** 0.5
    exponentials = torch.exp(scores)
    return (exponentials @ keys.double()) / (exponentials.sum(-1) + torch.exp(sink.double())).unsqueeze(1)


def make(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 3, 16, generator=generator)
    store = torch.randn(40, 16, generator=generator)
    store[-1] = 0.0
    store[10:20] = torch.nan  # rows of other requests: no table names them
    tables = []
    for width in (8, 5):
        table = torch.randint(20, 39, (rows, width), generator=generator)
        masked = torch.rand(rows, width, generator=generator) < 0.4
        table[masked] = -1
        tables.append(table)
    tables[0][:, 0] = 3
    return q, store, tables, torch.randn(3, generator=generator)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_equals_the_definition(rows: int) -> None:
    q, store, tables, sink = make(rows, rows)
    rotations = rope_table(torch.arange(rows) * 37, rope_frequencies(8, 10000.0, None))
    found = sparse_attention(q, [Keys(table, lambda t: store[t]) for table in tables], sink, rotations)
    assert found.shape == q.shape
    for row in range(rows):
        visible = [cell for table in tables for cell in table[row].tolist() if cell >= 0]
        expected = slow_attention(q[row], store[visible], sink)
        rotated = apply_rope(expected.float().unsqueeze(0), rotations[row : row + 1], inverse=True)[0]
        torch.testing.assert_close(found[row], rotated, rtol=1e-5, atol=1e-5)


def test_row_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, store, tables, sink = make(3, 9)
    rotations = rope_table(torch.arange(9), rope_frequencies(8, 10000.0, None))
    sources = [Keys(table, lambda t: store[t]) for table in tables]
    whole = sparse_attention(q, sources, sink, rotations)
    monkeypatch.setattr(attention_reference, "MAX_KEY_ELEMENTS", 2 * 13 * 16)
    torch.testing.assert_close(sparse_attention(q, sources, sink, rotations), whole)


def test_bf16_output_is_near_the_float32_one() -> None:
    q, store, tables, sink = make(4, 6)
    rotations = rope_table(torch.arange(6), rope_frequencies(8, 10000.0, None))
    low = sparse_attention(q.bfloat16(), [Keys(t, lambda t: store[t].bfloat16()) for t in tables], sink, rotations)
    high = sparse_attention(
        q.bfloat16().float(), [Keys(t, lambda t: store[t].bfloat16().float()) for t in tables], sink, rotations
    )
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).norm() / high.norm() < 2**-7
