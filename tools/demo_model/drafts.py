"""How often drafts of the MTP block are right: measured on text that the model itself chose greedily.

All rounds of a text at once: round i has seen the main model's streams up to position i and token i + 1, and drafts
tokens i + 2, i + 3, ... by feeding the block its own streams and drafts.
"""

from __future__ import annotations

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
    """Tokens of one sequence from position `start` on, through one layer whose raw keys [rows, head_dim] stay in
    `kept`."""

    kept: Tensor

    def __init__(self, length: int, start: int = 0, batch: int = 1) -> None:
        super().__init__(length, batch=batch)
        self.positions += start

    def keys(self, layer: Attention, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """The keys, kept."""
        raw, entries = super().keys(layer, inputs)
        self.kept = raw.flatten(0, 1)
        return raw, entries


class DraftStep(KeepKeys):
    """One more draft in every round: row r is the `len(drafted)`-th draft of the round at index `rounds[r]`.

    Args:
        rounds: int64 [rows], indices into `text_keys`.
        text_keys: [length, head_dim] of the text from position `start` on; row r sees those up to its round.
        drafted: keys [rows, head_dim] of the rounds' earlier drafts, oldest first.
    """

    def __init__(self, rounds: Tensor, start: int, text_keys: Tensor, drafted: list[Tensor]) -> None:
        super().__init__(length=1, batch=len(rounds))
        self._indices = rounds + len(drafted) + 1
        self.positions = start + self._indices
        self._text_keys, self._drafted = text_keys, drafted

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """The window that ends at each row's position: text, then drafts, then the row itself."""
        assert layer.ratio == 0  # the block of every released config has no compressed entries
        window, num_own = layer.config.sliding_window, len(self._drafted) + 1
        table = (self._indices - window + 1).unsqueeze(1) + torch.arange(window - num_own)
        own = [keys.unsqueeze(1) for keys in self._drafted] + [self.keys(layer, inputs)[0]]
        keys = torch.cat([self._text_keys[table.clamp_min(0)], *own], dim=1)
        mask = torch.cat([table >= 0, torch.ones(len(table), num_own, dtype=torch.bool)], dim=1)
        output = attend(self.split(inputs.q), keys, mask.unsqueeze(1), layer.sink).flatten(0, 1)
        return apply_rope(output, self.rope(layer.frequencies), inverse=True)


@torch.inference_mode()
def draft_tokens(model: Transformer, ids: Tensor, streams: Tensor, first: int) -> Tensor:
    """Drafts int64 [NUM_DRAFTS, length - first] of the rounds at positions first - 1 to length - 2.

    `ids` int64 [length] with the answer from index `first` > 0 on, `streams` [length, hc_mult, hidden] of the main
    model; [k, r] is for token first + 1 + r + k.
    """
    assert model.mtp is not None
    start = max(0, first - model.config.sliding_window)  # the block's one layer sees nothing earlier
    rounds = torch.arange(first - 1 - start, len(ids) - 1 - start)
    step = KeepKeys(len(ids) - 1 - start, start)
    streams, logits = model.mtp(streams[start:-1], ids[start + 1 :], step)
    text_keys, streams = step.kept, streams[rounds]
    drafted: list[Tensor] = []
    drafts = [logits[rounds].argmax(-1)]
    while len(drafts) < NUM_DRAFTS:
        step = DraftStep(rounds, start, text_keys, list(drafted))
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
        targets = ids[first + 1 :]  # of the first drafts
        counts = [num_right(drafts[:, index], targets[index:]) for index in range(len(targets))]
        for index, count in enumerate(counts):
            for k in range(min(NUM_DRAFTS, len(targets) - index, count + 1)):
                self.judged[k] += 1
                self.right[k] += k < count
        place = 0  # in counts; a round writes what was right and one token of the main model
        while place < len(counts):
            self.num_rounds += 1
            place += counts[place] + 1
        self.num_tokens += len(counts)

    def rates(self) -> list[float | None]:
        """Accept rate of the first, second and third draft; None where none was judged."""
        return [right / judged if judged else None for right, judged in zip(self.right, self.judged, strict=True)]

    def mean_length(self) -> float | None:
        """Tokens a round, 1 to NUM_DRAFTS + 1; the cut at the end of an answer counts against it."""
        return self.num_tokens / self.num_rounds if self.num_rounds else None


def num_right(drafts: Tensor, following: Tensor) -> int:
    """How many drafts from the first on are what follows."""
    count = 0
    for draft, token in zip(drafts.tolist(), following.tolist(), strict=False):
        if draft != token:
            break
        count += 1
    return count
