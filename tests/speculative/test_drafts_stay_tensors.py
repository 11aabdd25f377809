"""CUDA graphs need drafts that nobody reads before the step's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.engine import Engine, check_outputs, greedy
from support.models import random_ids, small_config, small_transformer

from dsv4serve.runner.drafts import Drafts

TRANSFORMER = small_transformer(small_config(), 1)
READS = ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "numpy")


class Reads:
    """Counts reads of tensors that happen inside of a method."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._is_inside = patch, False
        self.num = 0
        for name in READS:
            patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method: Callable) -> Callable:
        def counted(*args, **kwargs):
            self.num += self._is_inside
            return method(*args, **kwargs)

        return counted

    def inside(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def watched(*args):
            self._is_inside = True
            result = method(*args)
            self._is_inside = False
            return result

        self._patch.setattr(owner, name, watched)


@pytest.mark.parametrize(("sampling", "reads_per_pass"), [({}, 0), ({"logit_bias": {5: 1.0}}, 1)], ids=str)
def test_only_drafts_that_change_later_logits_are_read(
    monkeypatch: pytest.MonkeyPatch, sampling: dict, reads_per_pass: int
) -> None:
    num_passes = 0

    engine = Engine(TRANSFORMER, num_draft_tokens=3)
    requests = [greedy(f"r{n}", random_ids(TRANSFORMER.config, 20 + n, n), 30) for n in range(3)]
    requests.append(greedy("last", random_ids(TRANSFORMER.config, 30, 9), 30, **sampling))
    with monkeypatch.context() as patch:
        reads = Reads(patch)
        take = Drafts._take

        def counted(drafts: Drafts, places: list[int], chosen: torch.Tensor) -> None:
            nonlocal num_passes
            num_passes += 3 in [drafts.batch[place] for place in places]  # the slot of the last request
            take(drafts, places, chosen)

        patch.setattr(Drafts, "_take", counted)
        for name in ("choose", "end", "inputs", "logit_rows", "adjust_rows"):
            reads.inside(Drafts, name)
        outputs = engine.run(requests)
    assert num_passes > 20
    assert reads.num == reads_per_pass * num_passes
    if not sampling:
        check_outputs(TRANSFORMER, requests, outputs)
