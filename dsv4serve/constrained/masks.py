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


class _Row:
    """Progress of one request through its grammar."""

    def __init__(self, compiled: Compiled, after_id: int | None) -> None:
        self.compiled, self.matcher = compiled, compiled.matcher()
        self._after_id = after_id
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
        """Take a token that was drawn. The one that ends the request need not be part of the grammar."""
        if self._after_id is None:
            if not self.matcher.is_terminated():
                begin = time.thread_time()
                self.matcher.accept_token(token)
                self._costs[-1] += time.thread_time() - begin
        elif token == self._after_id:
            self._after_id = None

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

    def accept(self, slot: int, token: int) -> None:
        """The slot's request has drawn `token`."""
        row = self._rows.get(slot)
        if row is not None:
            row.accept(token)

    def is_too_slow(self, slot: int) -> bool:
        """Whether the slot's grammar takes so long that its request should end."""
        row = self._rows.get(slot)
        return row is not None and row.is_too_slow

    def apply(self, logits: Tensor, batch: Sequence[int]) -> None:
        """Set what the grammars forbid to -inf: float32 [B, V] in place, row b of slot batch[b].

        A grammar is stronger than bans: where both together leave nothing, all that the grammar allows is as likely.
        """
        if not self._rows:
            return
        masked = [
            (index, row)
            for index, slot in enumerate(batch)
            if (row := self._rows.get(slot)) is not None and row.is_open
        ]
        if not masked:
            return
        if self._bitmask.shape[0] < len(batch) or self._bitmask.shape[1] != -(-logits.shape[1] // 32):
            self._bitmask = xgrammar.allocate_token_bitmask(len(batch), logits.shape[1])
        for index, row in masked:
            row.fill(self._bitmask, index)
        indices = [index for index, _ in masked]
        self._mask(logits, indices)
        dead = [index for index in indices if logits[index].max() == -torch.inf]
        if dead:
            logits[dead] = 0.0
            self._mask(logits, dead)

    def _mask(self, logits: Tensor, indices: list[int]) -> None:
        bitmask = self._bitmask[: logits.shape[0]]
        xgrammar.apply_token_bitmask_inplace(logits, bitmask.to(logits.device), indices=indices)
