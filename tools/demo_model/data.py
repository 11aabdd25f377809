"""Batches made by worker processes while the model trains."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

from tools.demo_model.encoding import SampleEncoder
from tools.demo_model.mix import batch
from tools.demo_model.network import EXTRA_TOKENS
from tools.demo_model.schedule import MICRO_BATCHES, STEP_TOKENS, phase_at

AHEAD = 3  # batches that a worker makes in advance

Arrays = tuple[np.ndarray, np.ndarray]


class Batches:
    """The parts of `steps` that this rank trains on, each [rows, length + EXTRA_TOKENS]; worker w makes
    every `workers`-th of them."""

    def __init__(self, tokenizer: Path, seed: int, workers: int, steps: range, rank: int = 0, ranks: int = 1) -> None:
        parts = [(step, part) for step in steps for part in range(rank, MICRO_BATCHES, ranks)]
        context = multiprocessing.get_context("spawn")
        self._queues: list[Queue[Arrays]] = [context.Queue(AHEAD) for _ in range(workers)]
        self._workers = [
            context.Process(
                target=_work,
                args=(queue, tokenizer, seed, parts[worker::workers], steps.stop),
                daemon=True,
            )
            for worker, queue in enumerate(self._queues)
        ]
        for process in self._workers:
            process.start()
        self._next = 0

    def next(self) -> Arrays:
        """Tokens uint16 and categories uint8 of the next part. Raises RuntimeError when a worker has died."""
        worker = self._next % len(self._queues)
        self._next += 1
        while True:
            try:
                return self._queues[worker].get(timeout=5)
            except Exception as error:  # queue.Empty, or a pickling error of a dying process
                if not self._workers[worker].is_alive():
                    raise RuntimeError(f"data worker {worker} ended: see its traceback above") from error

    def close(self) -> None:
        """End the workers."""
        for process in self._workers:
            process.terminate()


def _work(queue: Queue[Arrays], tokenizer: Path, seed: int, mine: list[tuple[int, int]], steps: int) -> None:
    encoder = SampleEncoder(tokenizer)
    for step, part in mine:
        phase = phase_at(step, steps)
        rows = STEP_TOKENS // MICRO_BATCHES // phase.length
        queue.put(batch(encoder, seed, step, part, rows, phase.length + EXTRA_TOKENS, phase.mix))
