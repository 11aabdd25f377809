import pytest

from dsv4serve.obs.histogram import STEP_BOUNDS, StepHistogram


def test_counts_are_cumulative_and_bounds_belong_to_their_bucket():
    histogram = StepHistogram()
    for seconds in (0.0, STEP_BOUNDS[0], STEP_BOUNDS[1], STEP_BOUNDS[-1] + 1):
        histogram.observe(seconds)
    pairs = dict(histogram.cumulative())
    assert list(pairs)[-1] == "+Inf"
    assert [pairs[str(STEP_BOUNDS[0])], pairs[str(STEP_BOUNDS[1])], pairs[str(STEP_BOUNDS[-1])], pairs["+Inf"]] == [
        *(2, 3, 3, 4)
    ]
    assert histogram.sum == pytest.approx(STEP_BOUNDS[0] + STEP_BOUNDS[1] + STEP_BOUNDS[-1] + 1)


def test_no_bound_is_written_in_two_ways():
    assert [float(bound) for bound, _ in StepHistogram().cumulative()[:-1]] == list(STEP_BOUNDS)
