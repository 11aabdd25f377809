"""The sentinel names the first operation whose output is not finite."""

from __future__ import annotations

import logging
import math

import pytest
from support.engine import Engine, greedy
from support.models import random_ids, small_config

from dsv4_kernels.sampling import NonFiniteLogits
from dsv4serve.config import Numerics
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner.sentinel import Sentinel
from dsv4serve.types import StepOutput
from dsv4serve.weights.dummy import dummy_weights

CONFIG = small_config()
REQUEST = greedy("r", random_ids(CONFIG, 30, 1), 12)


def engine(broken: str = "", value: float = math.nan, **settings) -> Engine:
    """An engine that checks, of a model with one parameter of nothing but `value`."""
    weights = dummy_weights(CONFIG, 1)
    if broken:
        weights[broken].fill_(value)
    return Engine(Transformer(CONFIG, weights, Numerics.EXACT), observer=Sentinel(), **settings)


@pytest.mark.parametrize(
    ("parameter", "operation"),
    [
        ("embed.weight", "embedding"),
        ("layers.2.attn.q_norm.weight", "layers.2.attn.q"),
        ("layers.1.attn.kv_norm.weight", "layers.1.attn.kv"),
        ("layers.3.attn.compressor.norm.weight", "layers.3.attn.attend"),
        ("layers.0.attn.attn_sink", "layers.0.attn.attend"),
        ("layers.3.attn.wo_b.weight", "layers.3.attn.output"),
        ("layers.1.ffn.shared_experts.w2", "layers.1.ffn.output"),
    ],
)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "")])
def test_the_first_bad_layer_and_operation_are_named(
    parameter: str, operation: str, value: float, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if value == math.inf and parameter.endswith("attn_sink"):
        return  # an infinite sink takes all attention; its output is zero, and that is finite
    with caplog.at_level(logging.ERROR), pytest.raises(NonFiniteLogits):
        engine(parameter, value).run([REQUEST])
    (record,) = caplog.records
    assert f"in the output of {operation}: " in record.getMessage()
    assert kind in record.getMessage()


def test_a_sound_model_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    checked = engine(num_draft_tokens=2)
    with caplog.at_level(logging.ERROR):
        assert checked.run([REQUEST])["r"].token_ids == engine().run([REQUEST])["r"].token_ids
    assert not caplog.records


def test_a_broken_mtp_block_is_named_and_costs_speed_but_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    broken = engine("mtp.0.attn.wo_a.weight", num_draft_tokens=2)
    results: list[StepOutput] = []
    submit = broken.runner.submit

    def recorded(step):
        results.append(submit(step)())
        return lambda result=results[-1]: result

    broken.runner.submit = recorded
    with caplog.at_level(logging.ERROR):
        outputs = broken.run([REQUEST])
    assert outputs["r"].token_ids == engine().run([REQUEST])["r"].token_ids
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "NaN in the output of mtp.0.attn.output"
    ]
    drafting = [result for result in results if result.num_nonfinite_drafts]
    assert sum(result.num_nonfinite_drafts for result in drafting) == sum(broken.scheduler.stats().num_drafted) > 0
    assert {result.first_nonfinite for result in drafting} == {"mtp.0.attn.output"}
