"""The shadow check finds kernels that differ from the references, and changes nothing."""

from __future__ import annotations

import logging

import pytest
from support.engine import Engine, check_outputs, greedy
from support.models import random_ids, small_config, small_transformer

from dsv4_kernels import cpu
from dsv4serve.model import attention
from dsv4serve.runner.shadow import ShadowCheck
from dsv4serve.types import StepOutput

TRANSFORMER = small_transformer(small_config(), 1)
REQUESTS = [
    greedy(f"r{n}", random_ids(TRANSFORMER.config, length, n), 30) for n, length in enumerate((3, 125, 250, 600))
]


def checked(**settings) -> tuple[Engine, list[StepOutput]]:
    """An engine that compares every step, and what its runner returns."""
    engine = Engine(TRANSFORMER, max_step_tokens=256, **settings)
    runner, results = engine.runner, []
    runner._shadow = ShadowCheck(TRANSFORMER, runner.pools, every=1)
    submit = runner.submit

    def submitted(planned):
        results.append(submit(planned)())
        return lambda result=results[-1]: result

    runner.submit = submitted
    return engine, results


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_sound_kernels_do_not_drift_and_the_outputs_stay(num_draft_tokens: int) -> None:
    """Over chunks longer than rings, ends of C4 and C128 blocks and pages, and rejected drafts."""
    engine, results = checked(num_draft_tokens=num_draft_tokens)
    outputs = engine.run(REQUESTS)
    check_outputs(TRANSFORMER, REQUESTS, outputs)
    plain = Engine(TRANSFORMER, max_step_tokens=256, num_draft_tokens=num_draft_tokens).run(REQUESTS)
    assert {n: o.logits for n, o in outputs.items()} == {n: o.logits for n, o in plain.items()}
    assert sum(result.num_shadow_rows for result in results) > 50
    assert 0 < max(result.shadow_drift for result in results) < 1e-5
    assert not any(result.num_shadow_flips for result in results)


def test_a_wrong_kernel_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = attention.grouped_out_proj

    def wrong(*args, **settings):
        return right(*args, **settings) * (1.0 if cpu.library is None else 1.5)

    assert cpu.library is not None
    monkeypatch.setattr(attention, "grouped_out_proj", wrong)
    engine, results = checked()
    with caplog.at_level(logging.INFO, "dsv4serve.runner.shadow"):
        engine.run(REQUESTS)
    assert min(result.shadow_drift for result in results if result.num_shadow_rows) > 0.01
    assert sum(result.num_shadow_flips for result in results) > 0
    assert {record.levelno for record in caplog.records} == {logging.INFO, logging.WARNING}
    assert "rows differ from the reference kernels' by" in caplog.records[0].getMessage()


def test_every_so_many_steps_one_is_compared() -> None:
    engine, results = checked()
    engine.runner._shadow = ShadowCheck(TRANSFORMER, engine.runner.pools, every=5)
    engine.run(REQUESTS)
    assert [index % 5 == 4 for index in range(len(results))] == [bool(result.num_shadow_rows) for result in results]
