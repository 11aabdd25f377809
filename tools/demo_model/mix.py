"""Which samples make a batch: shares of tokens by builder, and documents packed into rows.

The documents of a batch depend on seed, step and part alone, not on how many processes make them.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Iterator

import numpy as np

from dsv4serve.chat.effort import TEXTS
from tools.demo_model.encoding import Document, SampleEncoder
from tools.demo_model.sample import Sample
from tools.demo_model.schedule import CATEGORIES

MIXES: dict[str, tuple[float, ...]] = {  # in the order of CATEGORIES
    "base": (0.06, 0.18, 0.10, 0.32, 0.07, 0.13, 0.08, 0.03, 0.03),
    "tools": (0.03, 0.09, 0.08, 0.48, 0.06, 0.14, 0.07, 0.02, 0.03),
}
LONG = ("recall", "copying", "tools")  # builders that are told how long a sample may be
PAD_ID = 2
POOL = 24  # documents that wait for a place
EFFORT_SHARE = 0.2  # of thinking chats
EFFORT_TEXTS = sorted({text for texts in TEXTS.values() for text in texts.values() if text})
MIN_CUT = 64  # a shorter gap at the end of a row is padded rather than filled with a cut text


def batch(
    encoder: SampleEncoder, seed: int, step: int, part: int, rows: int, width: int, mix: str
) -> tuple[np.ndarray, np.ndarray]:
    """One part of a step: tokens uint16 and categories uint8, both [rows, width]. Category 0 is not learnt, others are
    1 + index in CATEGORIES."""
    documents = _documents(encoder, random.Random(f"{seed}:{step}:{part}"), mix, width)
    pool: list[Document] = []
    tokens = np.full((rows, width), PAD_ID, dtype=np.uint16)
    categories = np.zeros((rows, width), dtype=np.uint8)
    for row in range(rows):
        filled = 0
        while filled < width:
            while len(pool) < POOL:
                pool.append(next(documents))
            space = width - filled
            index = next((i for i, document in enumerate(pool) if len(document.ids) <= space), None)
            if index is None:
                if space < MIN_CUT:
                    break
                index = next((i for i, document in enumerate(pool) if document.is_text), None)
                if index is None:
                    break
            document = pool.pop(index)
            end = min(width, filled + len(document.ids))
            tokens[row, filled:end] = document.ids[: end - filled]
            categories[row, filled:end] = document.learnt[: end - filled]
            filled = end
    return tokens, categories


def _documents(encoder: SampleEncoder, draw: random.Random, mix: str, width: int) -> Iterator[Document]:
    """Endless: always the builder that lags furthest behind its share of tokens."""
    shares = MIXES[mix]
    sources = [_samples(name, random.Random(draw.random()), width) for name in CATEGORIES]
    counts = [draw.random() * 200.0 for _ in CATEGORIES]  # so that rows do not all begin with the same kind
    while True:
        index = min(range(len(shares)), key=lambda i: counts[i] / shares[i])
        document = encoder.encode(with_effort(next(sources[index]), draw), index + 1)
        counts[index] += len(document.ids)
        if len(document.ids) <= width or document.is_text:
            yield document


def with_effort(sample: Sample, draw: random.Random) -> Sample:
    """Some thinking chats get the text of a higher effort, which one of the two contracts has even by default."""
    if not sample.thinking or draw.random() > EFFORT_SHARE:
        return sample
    return dataclasses.replace(sample, effort=draw.choice(EFFORT_TEXTS))


def _samples(name: str, draw: random.Random, width: int) -> Iterator[Sample]:
    builder = importlib.import_module(f"tools.demo_model.builders.{name}")
    samples: Iterator[Sample] = builder.samples(draw, max_tokens=width - 100) if name in LONG else builder.samples(draw)
    return samples
