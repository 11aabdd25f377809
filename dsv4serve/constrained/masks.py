"""Which tokens the constrained requests of a step may draw."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
import xgrammar
from torch import Tensor

from dsv4serve.constrained.compiler import Compiled, Compiler
from dsv4serve.types import Constraint

# An ambiguous grammar takes longer with each token. Steps wait for every row, so one that takes this long ends.
MAX_TOKEN_S = 0.05  # processor time, on average over the last tokens
AVERAGED_TOKENS = 4
MOST_DRAFTS = 8  # tokens that can be taken back


class _Row:
    """Progress of one request through its grammar."""

    def __init__(self, compiled: Compiled, after_id: int | None) -> None:
        self.compiled, self.matcher = compiled, compiled.matcher()
        self._after_id = after_id
        # What each of the last tokens changed: the matcher's steps, and the id behind which it began.
        self._taken: deque[tuple[int, int | None]] = deque(maxlen=MOST_DRAFTS)
        self._costs: deque[float] = deque([0.0] * AVERAGED_TOKENS, AVERAGED_TOKENS)

    @property
    def is_open(self) -> bool:
        """Whether the grammar has begun."""
        return self._after_id is None

    @property
    def is_too_slow(self) -> bool:
        """Whether the grammar takes too long for others to wait."""
        return sum(self._costs) > MAX_TOKEN_S * AVERAGED_TOKENS

    def accept(self, token: int) -> None:
        """Take a token that was drawn, or drafted. The one that ends the request need not be part of the grammar."""
        num_steps, after_id = 0, self._after_id
        if after_id is None:
            if not self.matcher.is_terminated():
                begin = time.thread_time()
                num_steps = int(self.matcher.accept_token(token))
                self._costs[-1] += time.thread_time() - begin
        elif token == self._after_id:
            self._after_id = None
        self._taken.append((num_steps, after_id))

    def undo(self, num_tokens: int) -> None:
        """Take back the last `num_tokens`, at most MOST_DRAFTS: they were drafts."""
        num_steps = 0
        for _ in range(num_tokens):
            steps, self._after_id = self._taken.pop()
            num_steps += steps
        if num_steps:
            self.matcher.rollback(num_steps)

    def fill(self, bitmask: Tensor, index: int) -> None:
        """Set row `index` of an int32 bitmask [B, ceil(V / 32)] to the tokens that may come next."""
        if self.matcher.is_terminated():
            bitmask[index] = -1  # the sequence has ended, and nobody reads what it draws
            return
        begin = time.thread_time()
        self.matcher.fill_next_token_bitmask(bitmask, index)
        self._costs.append(time.thread_time() - begin)
        if not self.compiled.uses_marker:
            word, bit = divmod(self.compiled.marker_id, 32)
            bitmask[index, word] &= ~(1 << bit) if bit < 31 else 0x7FFFFFFF
        if not bitmask[index].any():  # nothing in this vocabulary continues it
            word, bit = divmod(self.compiled.eos_token_id, 32)
            bitmask[index, word] |= 1 << bit if bit < 31 else -(1 << 31)


class TokenMasks:
    """Grammars of the slots whose requests are constrained; the others cost nothing."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self._rows: dict[int, _Row] = {}
        self._bitmask = torch.empty((0, 0), dtype=torch.int32)

    def start(self, slot: int, constraint: Constraint | None, output_ids: Sequence[int]) -> None:
        """A request takes the slot, having generated `output_ids` before a retraction."""
        self._rows.pop(slot, None)
        if constraint is None:
            return
        row = self._rows[slot] = _Row(self.compiler.compile(constraint), constraint.after_id)
        for token in output_ids:
            row.accept(token)

    def has(self, slot: int) -> bool:
        """Whether the slot's request is constrained."""
        return slot in self._rows

    def accept(self, slot: int, token: int) -> None:
        """The slot's request has drawn `token`."""
        row = self._rows.get(slot)
        if row is not None:
            row.accept(token)

    def undo(self, slot: int, num_tokens: int) -> None:
        """The last `num_tokens` that the slot's request accepted were drafts."""
        row = self._rows.get(slot)
        if row is not None:
            row.undo(num_tokens)

    def is_too_slow(self, slot: int) -> bool:
        """Whether the slot's grammar takes so long that its request should end."""
        row = self._rows.get(slot)
        return row is not None and row.is_too_slow

    def apply(self, logits: Tensor, batch: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> None:
        """Set what the grammars forbid to -inf: float32 [rows, V] in place. One row for each slot of `batch`, or, where
        drafts[b] are given, 1 + len(drafts[b]) neighbouring rows, which choose the tokens behind 0, 1, .. of them.

        A grammar is stronger than bans: where both together leave nothing, all that the grammar allows is as likely.
        """
        if not self._rows:
            return
        if self._bitmask.shape[0] < len(logits) or self._bitmask.shape[1] != -(-logits.shape[1] // 32):
            self._bitmask = xgrammar.allocate_token_bitmask(len(logits), logits.shape[1])
        indices: list[int] = []
        first = 0
        for place, slot in enumerate(batch):
            row, ahead = self._rows.get(slot), drafts[place] if drafts else ()
            if row is not None:
                indices += self._fill(row, first, ahead)
            first += 1 + len(ahead)
        if not indices:
            return
        self._mask(logits, indices)
        dead = [index for index in indices if logits[index].max() == -torch.inf]
        if dead:
            logits[dead] = 0.0
            self._mask(logits, dead)

    def _fill(self, row: _Row, first: int, ahead: Sequence[int]) -> list[int]:
        """Masks of the rows from `first` on, behind 0, 1, .. of the drafts `ahead`. Returns the rows that have one."""
        filled = []
        for place in range(1 + len(ahead)):
            if place:
                row.accept(ahead[place - 1])
            if row.is_open:
                row.fill(self._bitmask, first + place)
                filled.append(first + place)
        row.undo(len(ahead))
        return filled

    def _mask(self, logits: Tensor, indices: list[int]) -> None:
        bitmask = self._bitmask[: logits.shape[0]]
        xgrammar.apply_token_bitmask_inplace(logits, bitmask.to(logits.device), indices=indices)
