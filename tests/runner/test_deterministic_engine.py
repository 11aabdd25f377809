"""The device's network in deterministic mode, by Triton's interpreter: a request alone and in crowds, the same bits.

Thresholds between forms are lowered until a few rows are many; tests/kernels/test_deterministic.py takes them as they
are, an operation at a time.
"""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.crowd import among, differences, prefill, run
from support.device_models import CONFIG, both, checkpoint
from support.models import random_ids

from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm import triton as gemm
from dsv4_kernels.indexer import queries
from dsv4_kernels.indexer import triton as indexer
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mhc import triton as mhc

HELD = 126  # tokens, so that the next ones end a block of every ratio


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    reference, network = both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cpu"))
    ids = random_ids(CONFIG, HELD + 4, 3)
    return network, ids, prefill(reference, ids[:HELD])


@pytest.fixture
def _few_rows_are_many(monkeypatch):
    monkeypatch.setattr(gemm, "MOST_SPLIT_TOKENS", 4)
    monkeypatch.setattr(gemm, "PROGRAMS", 8)
    monkeypatch.setattr(gemm, "MIN_SPLIT_DEPTH", 64)
    monkeypatch.setattr(mhc, "MANY", 6)
    monkeypatch.setattr(queries, "MANY", 4)
    monkeypatch.setattr(indexer, "ONE_LAUNCH_ROWS", 4)
    monkeypatch.setattr(moe, "choose_tile", lambda tokens, *_: 16 if tokens < 4 else 64)


@pytest.fixture
def orders(monkeypatch):
    """Weight's rows, depth and format of products, and in how many parts they were added up, which decides the bits."""
    seen, tiles_for = set(), gemm.tiles_for

    def spy(num_tokens, *weight):
        tiles = tiles_for(num_tokens, *weight)
        seen.add((*weight, tiles.splits * tiles.turns))
        return tiles

    monkeypatch.setattr(gemm, "tiles_for", spy)
    return seen


@pytest.mark.usefixtures("_few_rows_are_many")
def test_a_request_has_the_same_bits_alone_and_in_any_crowd_and_any_chunks(request_, orders):
    network, ids, held = request_
    crowd = among([1, 2], 1, 4)
    with deterministic():
        expected = run(network, ids, among([3], 1, 0), held, HELD)
        alone = set(orders)
        found = run(network, ids, crowd, held, HELD)
    assert orders == alone
    assert not any(differences(found, expected))
    run(network, ids, crowd, held, HELD)
    assert orders > alone  # so the crowd is one whose bits may be others; whether they are depends on the processor
