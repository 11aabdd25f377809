"""Window rows and queries on a GPU against the references, bit for bit where float32 sums are exact."""

import pytest
import torch

from dsv4_kernels.kv_store.cases import CASES, POISON, exact, expected_rows
from dsv4_kernels.kv_store.triton import commit, prepare_q, store_kv
from dsv4_kernels.norm.reference import head_norm
from dsv4_kernels.rope.reference import apply_rope


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_stored_bit_for_bit(case):
    inputs = exact(case.make(1, "cuda"), "latent_kv")
    store_kv(**inputs)
    commit(*(inputs[key] for key in ("rows", "step_planes", "ring_planes", "ring_rows", "window")))
    encoded = expected_rows(inputs, case.shapes)
    for found, ring, new in zip(inputs["step_planes"], inputs["ring_planes"], encoded, strict=True):
        expected = torch.full_like(ring, POISON, device="cpu")
        first = 0
        for slot, (start, count) in zip(case.slots, case.requests, strict=True):
            for row in range(max(0, count - case.ring_rows), count):
                expected[slot * case.ring_rows + (start + row) % case.ring_rows] = new[first + row]
            first += count
        assert torch.equal(found[: case.num_tokens].cpu(), new[: case.num_tokens])
        assert (found[case.num_tokens :] == POISON).all()
        assert torch.equal(ring.cpu(), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_rows_differ_only_where_a_sum_decides_a_rounding(case):
    inputs = case.make(2, "cuda")
    store_kv(**inputs)
    for found, new in zip(inputs["step_planes"], expected_rows(inputs, case.shapes), strict=True):
        differ = found[: case.num_tokens].cpu() != new[: case.num_tokens]
        assert differ.sum() <= 2e-3 * new.numel()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queries_are_prepared_bit_for_bit(case):
    inputs = exact(case.queries(3, "cuda"), "q")
    q, rotations = inputs["q"].cpu(), inputs["rotations"].cpu()
    expected = apply_rope(head_norm(q, inputs["eps"]), rotations)[: case.num_tokens]
    out = torch.full_like(inputs["q"], 7.0)
    prepare_q(**inputs, out=out)
    assert torch.equal(out[: case.num_tokens].cpu(), expected)
    assert (out[case.num_tokens :] == 7.0).all()
    prepare_q(**inputs)
    assert torch.equal(inputs["q"][: case.num_tokens], out[: case.num_tokens])
