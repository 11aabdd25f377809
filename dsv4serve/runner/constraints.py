"""Constraints of the runner's requests. Nothing is loaded before the first of them: it takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from torch import Tensor

from dsv4serve.constrained.vocabulary import Vocabulary
from dsv4serve.types import Constraint, SlotStart

if TYPE_CHECKING:
    from dsv4serve.constrained.masks import TokenMasks

TOO_SLOW = "the grammar is too ambiguous: each token takes longer than others can wait for; repeat less in repeats"


class Constraints:
    """The token masks of the slots.

    Args:
        read: gives the vocabulary of the model. Raises CheckpointError when there is none.
    """

    def __init__(self, read: Callable[[], Vocabulary]) -> None:
        self._read = read
        self._masks: TokenMasks | None = None
        self._thread = ThreadPoolExecutor(1, "compile")

    def prepare(self, constraint: Constraint) -> Future[None]:
        """Compile in a thread, so that the steps of other requests go on; to be awaited before the request starts.

        The result raises InvalidRequest for what is no grammar, CheckpointError without a tokenizer.
        """
        if self._masks is not None and self._masks.compiler.knows(constraint):
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(self._compile, constraint)

    def _compile(self, constraint: Constraint) -> None:
        if self._masks is None:
            from dsv4serve.constrained.compiler import Compiler
            from dsv4serve.constrained.masks import TokenMasks

            self._masks = TokenMasks(Compiler(self._read))
        self._masks.compiler.compile(constraint)

    def start(self, start: SlotStart) -> None:
        """A request takes the slot."""
        constraint = start.sampling.constraint
        if constraint is not None and self._masks is None:
            self.prepare(constraint).result()
        if self._masks is not None:
            self._masks.start(start.slot, constraint, start.token_ids[start.num_prompt_tokens :])

    def has(self, slot: int) -> bool:
        """Whether the slot's request has one."""
        return self._masks is not None and self._masks.has(slot)

    def accept(self, slot: int, token: int) -> str | None:
        """The slot's request has drawn `token`. Why it cannot go on, if it cannot."""
        if self._masks is None:
            return None
        self._masks.accept(slot, token)
        return TOO_SLOW if self._masks.is_too_slow(slot) else None

    def look_ahead(self, slot: int, token: int) -> None:
        """Take a draft, until `undo`."""
        if self._masks is not None:
            self._masks.accept(slot, token)

    def undo(self, slot: int, num_tokens: int) -> None:
        """Take back the last `num_tokens` drafts."""
        if self._masks is not None:
            self._masks.undo(slot, num_tokens)

    def apply(self, logits: Tensor, batch: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> None:
        """Mask float32 [rows, V] in place; see TokenMasks.apply."""
        if self._masks is not None:
            self._masks.apply(logits, batch, drafts)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
