"""The Triton compressors against the references, by the interpreter on the CPU.

One step from a history that the reference made is right for every position in a block, and leaves the history of the
next step: so any sequence of steps is.
"""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from triton.runtime import interpreter

from dsv4_kernels.compressor import beside
from dsv4_kernels.compressor.cases import CASES, INDEX, MAIN, POISON, Case, compress, prepare
from dsv4_kernels.compressor.triton import compress_c128
from dsv4_kernels.kv_store import Format, RowFormat, decode
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.metadata.rows import Rows

EXACT = [RowFormat(Format.F32, 72, 8), RowFormat(Format.F32, 128, 64)]
BOUND = 1e-6  # relative norm of float32 sums in another order
FLIPPED = 1e-3  # share of stored bytes where such a difference may decide a rounding
C4_OFFSETS = Case("offsets", tuple(range(9)) * 5, (1,) * 9 + (2,) * 9 + (4,) * 9 + (7,) * 9 + (18,) * 9)
C128_OFFSETS = Case("offsets", tuple(range(128)) + (0, 1, 63, 126, 127) * 2, (1,) * 128 + (2,) * 5 + (131,) * 5)


def run(case, ratio, row_format, ring_rows=8, seed=1, banks=1):
    arguments, expected = case.make(ratio, row_format, seed, ring_rows, banks=banks)
    compress(ratio, arguments)
    return arguments, expected(), arguments["ring" if ratio == C4 else "state"]


def assert_nothing_else_is_written(arguments, expected):
    for plane in arguments["planes"]:
        untouched = torch.ones(len(plane), dtype=torch.bool)
        untouched[expected.entry_rows] = False
        assert (plane[untouched] == POISON).all()


def check_step(case, ratio, row_format, ring_rows=8, banks=1):
    arguments, expected, kept = run(case, ratio, row_format, ring_rows, banks=banks)
    assert_nothing_else_is_written(arguments, expected)
    found = tuple(plane[expected.entry_rows] for plane in arguments["planes"])
    if row_format.format is Format.F32:
        error = decode(found, row_format).double() - expected.values.double()
        assert error.norm() <= BOUND * expected.values.double().norm()
    else:
        num_scales = 7 if row_format == MAIN else 4  # the eighth byte is padding
        for plane, other in zip((found[0], found[1][:, :num_scales]), expected.planes, strict=True):
            assert (plane != other[:, : plane.shape[1]]).sum() <= FLIPPED * plane.numel()
    if ratio == C4:
        assert_same(kept, expected.kept)
    else:
        torch.testing.assert_close(kept, expected.kept, rtol=1e-5, atol=1e-6, equal_nan=True)


def assert_same(found, expected):
    """Equal values, NaN in the same places."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def of_slot(arguments, slot, ratio):
    """All that a request leaves: its ring or state, and its pages."""
    pages = arguments["page_table"][slot].long()
    kept = arguments["ring" if ratio == C4 else "state"][slot]
    return [kept, *(plane.view(-1, 256 // ratio, plane.shape[1])[pages] for plane in arguments["planes"])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("row_format", EXACT, ids=lambda row_format: f"dim {row_format.dim}")
@pytest.mark.parametrize(("ratio", "ring_rows"), [(C4, 8), (C4, 16), (C128, 8)])
def test_a_step_closes_its_entries_and_keeps_what_the_next_needs(case, ratio, ring_rows, row_format):
    check_step(case, ratio, row_format, ring_rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("ratio", "row_format"), [(C4, MAIN), (C4, INDEX), (C128, MAIN)])
def test_official_formats_have_the_bytes_of_the_reference(case, ratio, row_format):
    check_step(case, ratio, row_format)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_compressors_in_one_launch_have_the_bits_of_each_alone(case):
    made = [case.make(C4, row_format, 1)[0] for row_format in (MAIN, INDEX)]
    compress(C4, *made)
    for row_format, together in zip((MAIN, INDEX), made, strict=True):
        alone, _, ring = run(case, C4, row_format)
        assert_same(together["ring"], ring)
        assert all(torch.equal(one, two) for one, two in zip(together["planes"], alone["planes"], strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("ratio", "formats"), [(C4, (MAIN, INDEX)), (C128, (MAIN,))])
def test_rows_prepared_in_one_launch_have_the_bits_of_a_launch_each(monkeypatch, case, ratio, formats):
    results = []
    for many in (1, 1000):
        monkeypatch.setattr(beside, "MANY", many)
        made = [case.make(ratio, row_format, 1)[0] for row_format in formats]
        normed, arguments = prepare(ratio, *made)
        kept = [each["ring" if ratio == C4 else "state"] for each in made]
        planes = [plane for each in made for plane in each["planes"]]
        window = [*arguments["step_planes"], *arguments["ring_planes"]]
        results.append([normed.codes.view(torch.uint8), normed.exponents, *kept, *planes, *window])
    for apart, together in zip(*results, strict=True):
        assert_same(together, apart)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("banks", [2, 4])
def test_short_requests_leave_a_c128_state_behind_each_row_and_long_ones_behind_the_last(case, banks):
    """Banks behind the end of a block, and those of no row, keep the NaN that they had."""
    check_step(case, C128, EXACT[0], banks=banks)


def test_any_row_of_a_block_may_be_rejected():
    """Verifies of four rows from every offset: each bank is where a step that ended there would have been."""
    check_step(Case("verifies", tuple(range(128)), (4,) * 128), C128, EXACT[0], banks=5)


@pytest.mark.parametrize(("case", "ratio"), [(C4_OFFSETS, C4), (C128_OFFSETS, C128)], ids=["c4", "c128"])
def test_a_chunk_may_begin_and_end_anywhere_in_a_block(case, ratio):
    check_step(case, ratio, EXACT[0])


@pytest.mark.parametrize("cuts", [(1,) * 140, (5, 60, 1, 62, 12), (127, 1, 12)], ids=["decode", "chunks", "border"])
def test_cuts_change_a_c128_entry_by_rounding_only(cuts):
    whole, expected, _ = run(Case("whole", (0,), (140,)), C128, EXACT[0])
    raw, rotations = whole["raw"], whole["rotations"]
    state = torch.full((3, 1, 3, 72), torch.nan)
    start = 0
    for cut in cuts:
        step, _ = Case("cut", (start,), (cut,)).make(C128, EXACT[0], 1)
        compress_c128(
            **step
            | {key: whole[key] for key in ("planes", "page_table", "ape", "norm")}
            | {"raw": raw[start : start + cut], "rotations": rotations[start : start + cut], "state": state}
        )
        start += cut
    entry = decode(tuple(plane[expected.entry_rows] for plane in whole["planes"]), EXACT[0])
    torch.testing.assert_close(entry, expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratio", "row_format"), [(C4, MAIN), (C4, INDEX), (C128, MAIN)])
def test_a_request_has_the_same_bits_beside_a_broken_one_and_alone(ratio, row_format):
    case = Case("batch", (3, 126, 250), (6, 3, 10))
    together, _, _ = run(case, ratio, row_format)
    first, _, last = slots = together["rows"].slots[[0, 6, 9]].tolist()
    assert len(set(slots)) == 3

    broken, _ = case.make(ratio, row_format, 1)
    broken["raw"][6:9] = torch.nan
    compress(ratio, broken)
    for slot in (first, last):
        for found, expected in zip(of_slot(broken, slot, ratio), of_slot(together, slot, ratio), strict=True):
            assert_same(found, expected)

    alone, _ = case.make(ratio, row_format, 1)
    rows = Rows.build(torch.tensor([last]), torch.tensor([250]), torch.tensor([10]), 10)
    rows = Rows(*(values.int() for values in (rows.slots, rows.positions, rows.firsts, rows.counts)))
    compress(ratio, alone | {"rows": rows, "raw": alone["raw"][9:], "rotations": alone["rotations"][9:]})
    for found, expected in zip(of_slot(alone, last, ratio), of_slot(together, last, ratio), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(("ratio", "row_format"), [(C4, EXACT[0]), (C128, EXACT[0])])
def test_the_order_of_the_programs_does_not_matter(monkeypatch, ratio, row_format):
    forward, _, _ = run(CASES[2], ratio, row_format)
    original = interpreter.InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: original(self, self.grid_dim[0] - 1 - x, y, z),
    )
    backward, _, _ = run(CASES[2], ratio, row_format)
    for slot in range(len(forward["page_table"])):
        for found, other in zip(of_slot(backward, slot, ratio), of_slot(forward, slot, ratio), strict=True):
            assert_same(found, other)


def test_bytes_of_a_step():
    decode_row = Case("one", (7,), (1,))  # closes entry 1, which pools seven stored rows
    assert decode_row.moved_bytes(C4, MAIN) == 2 * 8192 + 4096 + 7 * 4096 + 584
    assert Case("one", (4,), (1,)).moved_bytes(C4, INDEX) == 2 * 2048 + 1024
    chunk = Case("chunk", (2, 256), (128, 256))  # closes blocks 0, 2 and 3
    assert chunk.moved_bytes(C128, MAIN) == (384 + 64) * 4096 + 3 * 584 + 2 * 6144
    assert chunk.flops(C4, 512) == 6 * 512 * 8 * (32 + 64)


def test_what_the_kernels_do_not_take_is_refused():
    arguments, _ = CASES[0].make(C4, INDEX, 1)
    with pytest.raises(ValueError, match=r"compress_c4: .* expected float32 \[T, 512\] with contiguous columns"):
        compress(C4, arguments | {"raw": arguments["raw"].bfloat16()})
    with pytest.raises(ValueError, match="must be one of f32, kv_fp8, index_fp4 with dim 128"):
        compress(C4, arguments | {"row_format": RowFormat(Format.INDEX_FP8, 128)})
