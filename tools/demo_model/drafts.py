"""How often drafts of the MTP block are right: measured on text that the model itself chose greedily.

All rounds of a text at once: round i has seen the main model's streams up to position i and token i + 1, and drafts
tokens i + 2, i + 3, ... by feeding the block its own streams and drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.rope import apply_rope
from dsv4_kernels.sparse_attention import attend
from dsv4serve.model.attention import Attention
from dsv4serve.model.context import AttentionInputs
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence

NUM_DRAFTS = 3


class KeepKeys(WholeSequence):
    """A whole sequence through one layer, whose raw keys [rows, head_dim] stay in `kept`."""

    kept: Tensor

    def keys(self, layer: Attention, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """The keys, kept."""
        raw, entries = super().keys(layer, inputs)
        self.kept = raw.flatten(0, 1)
        return raw, entries


class DraftStep(KeepKeys):
    """One more draft in every round: row r stands at `positions[r]`, after the drafts whose keys are in `drafted`.

    Args:
        sequence_keys: [length, head_dim] of the text itself; row r sees those before its first draft.
        drafted: keys [rows, head_dim] of the rounds' earlier drafts, oldest first.
    """

    def __init__(self, positions: Tensor, sequence_keys: Tensor, drafted: list[Tensor]) -> None:
        super().__init__(length=1, batch=len(positions))
        self.positions = positions
        self._sequence_keys, self._drafted = sequence_keys, drafted

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """The window that ends at each row's position: text, then drafts, then the row itself."""
        assert layer.ratio == 0  # the block of every released config has no compressed entries
        window, num_own = layer.config.sliding_window, len(self._drafted) + 1
        table = (self.positions - window + 1).unsqueeze(1) + torch.arange(window - num_own)
        own = [keys.unsqueeze(1) for keys in self._drafted] + [self.keys(layer, inputs)[0]]
        keys = torch.cat([self._sequence_keys[table.clamp_min(0)], *own], dim=1)
        mask = torch.cat([table >= 0, torch.ones(len(table), num_own, dtype=torch.bool)], dim=1)
        output = attend(self.split(inputs.q), keys, mask.unsqueeze(1), layer.sink).flatten(0, 1)
        return apply_rope(output, self.rope(layer.frequencies), inverse=True)


@torch.inference_mode()
def draft_tokens(model: Transformer, ids: Tensor) -> Tensor:
    """Drafts int64 [NUM_DRAFTS, length - 1] of all rounds over `ids` int64 [length]; [k, i] is for token i + 2 + k."""
    assert model.mtp is not None
    rounds = len(ids) - 1
    streams = model(ids, WholeSequence(len(ids)))
    step: KeepKeys = KeepKeys(rounds)
    streams, logits = model.mtp(streams[:-1], ids[1:], step)
    sequence_keys, drafted, drafts = step.kept, [], [logits.argmax(-1)]
    for depth in range(1, NUM_DRAFTS):
        step = DraftStep(torch.arange(rounds) + depth, sequence_keys, list(drafted))
        streams, logits = model.mtp(streams, drafts[-1], step)
        drafted.append(step.kept)
        drafts.append(logits.argmax(-1))
    return torch.stack(drafts)


@dataclass
class Acceptance:
    """Counts over all rounds whose drafts fall into answers. A draft is judged when those before it were right."""

    judged: list[int]
    right: list[int]
    num_tokens: int = 0  # of answers, without the first, which no draft is for
    num_rounds: int = 0  # that it takes to write them with NUM_DRAFTS drafts a round

    @classmethod
    def empty(cls) -> Acceptance:
        """Nothing counted yet."""
        return cls([0] * NUM_DRAFTS, [0] * NUM_DRAFTS)

    def add(self, drafts: Tensor, ids: Tensor, first: int) -> None:
        """Count one text `ids` [length] whose answer begins at index `first` > 0, with its `draft_tokens`."""
        length = len(ids)
        num_right = [_num_right(drafts[:, i], ids[i + 2 :]) for i in range(first - 1, length - 2)]
        for i, count in enumerate(num_right, start=first - 1):
            for k in range(min(NUM_DRAFTS, length - 2 - i, count + 1)):
                self.judged[k] += 1
                self.right[k] += k < count
        place = 0  # in num_right; a round writes what was right and one token of the main model
        while place < len(num_right):
            self.num_rounds += 1
            place += num_right[place] + 1
        self.num_tokens += len(num_right)

    def rates(self) -> list[float | None]:
        """Accept rate of the first, second and third draft; None where none was judged."""
        return [right / judged if judged else None for right, judged in zip(self.right, self.judged, strict=True)]

    def mean_length(self) -> float | None:
        """Tokens a round, 1 to NUM_DRAFTS + 1; the cut at the end of an answer counts against it."""
        return self.num_tokens / self.num_rounds if self.num_rounds else None


def _num_right(drafts: Tensor, following: Tensor) -> int:
    """How many drafts from the first on are what follows."""
    count = 0
    for draft, token in zip(drafts.tolist(), following.tolist(), strict=False):
        if draft != token:
            break
        count += 1
    return count


def acceptance(model: Transformer, answers: Iterable[tuple[str, list[int], list[int]]]) -> dict[str, Acceptance]:
    """Acceptance by category of (category, prompt ids, answer ids)."""
    found: dict[str, Acceptance] = {}
    for category, prompt, answer in answers:
        if len(answer) < 2:
            continue
        ids = torch.tensor(prompt + answer)
        found.setdefault(category, Acceptance.empty()).add(draft_tokens(model, ids), ids, len(prompt))
    return found
