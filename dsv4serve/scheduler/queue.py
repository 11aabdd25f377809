"""The requests that wait, in the order in which they will be admitted."""

from __future__ import annotations

from bisect import bisect_left, insort

from dsv4serve.scheduler.state import RequestState


class WaitingQueue:
    """Sorted by `RequestState.order`. A retracted request keeps its order, so it is ahead of its class again."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._states)

    @property
    def num_retracted(self) -> int:
        """Those that ran before."""
        return sum(state.was_retracted for state in self._states)

    @property
    def head(self) -> RequestState | None:
        """Who is next."""
        return self._states[0] if self._states else None

    def push(self, state: RequestState) -> None:
        """Queue `state` at its place."""
        insort(self._states, state, key=_order)

    def remove(self, state: RequestState) -> None:
        """Take `state` out, wherever it is."""
        del self._states[bisect_left(self._states, state.order, key=_order)]


def _order(state: RequestState) -> tuple[float, int]:
    return state.order
