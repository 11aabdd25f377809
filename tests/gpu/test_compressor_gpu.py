"""The compressors on a GPU against the references, at the shapes of the released models and of the demo."""

import pytest
import torch

from dsv4_kernels.compressor import beside
from dsv4_kernels.compressor.cases import CASES, INDEX, MAIN, POISON, Case, compress, prepare
from dsv4_kernels.kv_store import Format, RowFormat, decode
from dsv4_kernels.metadata import C4, C128

# Relative norm of the stored values. A float32 sum in another order now and then decides the rounding of an element
# (bfloat16, then FP8 with 3 or FP4 with 1 bit of mantissa).
BOUNDS = {Format.F32: 3e-6, Format.KV_FP8: 3e-3, Format.INDEX_FP4: 2e-2}
DEMO_MAIN = RowFormat(Format.KV_FP8, 128, 64)
EXACT = RowFormat(Format.F32, 512, 64)
CHUNKS = Case("chunks", (256, 1000, 0), (512, 3, 700), num_padding=5)


@pytest.mark.parametrize("case", [*CASES, CHUNKS], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("ratio", "row_format"),
    [(C4, EXACT), (C4, MAIN), (C4, INDEX), (C4, DEMO_MAIN), (C128, EXACT), (C128, MAIN), (C128, DEMO_MAIN)],
)
@pytest.mark.parametrize("ring_rows", [8, 16])
def test_a_step_closes_its_entries_and_keeps_what_the_next_needs(case, ratio, row_format, ring_rows):
    arguments, expected = case.make(ratio, row_format, 1, ring_rows, device="cuda")
    compress(ratio, arguments)
    expected = expected()
    entries = expected.entry_rows.cuda()
    planes = arguments["planes"]
    for plane in planes:
        untouched = torch.ones(len(plane), dtype=torch.bool, device="cuda")
        untouched[entries] = False
        assert (plane[untouched] == POISON).all()
    found = decode(tuple(plane[entries].cpu() for plane in planes), row_format).double()
    values = decode(expected.planes, row_format).double()
    assert (found - values).norm() <= BOUNDS[row_format.format] * values.norm()
    if ratio == C4:
        assert torch.equal(arguments["ring"].cpu().nan_to_num(7.0), expected.kept.nan_to_num(7.0))
    else:
        torch.testing.assert_close(arguments["state"].cpu(), expected.kept, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("ratio", "row_format"), [(C4, MAIN), (C4, INDEX), (C128, MAIN)])
def test_a_step_leaves_the_same_bits_every_time(ratio, row_format):
    """A race between reading and writing a slot's history would show as a difference between runs."""
    case = Case("race", tuple(range(256, 256 + 64)), (37,) * 64)
    kept = "ring" if ratio == C4 else "state"
    runs = []
    for _ in range(5):
        arguments, _ = case.make(ratio, row_format, 1, device="cuda")
        compress(ratio, arguments)
        runs.append([arguments[kept].nan_to_num(7.0), *arguments["planes"]])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_two_compressors_in_one_launch_have_the_bits_of_each_alone():
    formats = (MAIN, INDEX)
    made, alone = ([CHUNKS.make(C4, each, 1, device="cuda")[0] for each in formats] for _ in range(2))
    compress(C4, *made)
    for one, other in zip(made, alone, strict=True):
        compress(C4, other)
        assert torch.equal(one["ring"].nan_to_num(7.0), other["ring"].nan_to_num(7.0))
        assert all(torch.equal(plane, same) for plane, same in zip(one["planes"], other["planes"], strict=True))


@pytest.mark.parametrize(("ratio", "formats"), [(C4, (MAIN, INDEX)), (C128, (MAIN,))])
def test_rows_prepared_in_one_launch_are_those_of_a_launch_each(monkeypatch, ratio, formats):
    """Entries and history to the bit; a norm's sum has another order with more warps, which moves few codes."""
    results = []
    for many in (1, 1000):
        monkeypatch.setattr(beside, "MANY", many)
        made = [CASES[1].make(ratio, row_format, 1, device="cuda")[0] for row_format in formats]
        normed, arguments = prepare(ratio, *made)
        kept = [each["ring" if ratio == C4 else "state"].nan_to_num(7.0) for each in made]
        exact = [*kept, *(plane for each in made for plane in each["planes"])]
        rounded = [normed.codes.view(torch.uint8), normed.exponents, *arguments["step_planes"]]
        results.append((exact, [*rounded, *arguments["ring_planes"]]))
    assert all(torch.equal(one, other) for one, other in zip(results[0][0], results[1][0], strict=True))
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one != other).float().mean() <= 1e-3
