"""The device engine by Triton's interpreter on CPU tensors: the network, the step over the cache, the runner."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_engine import Sequences, check_layers
from support.device_models import CONFIG, both, checkpoint
from support.models import random_ids


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cpu"))


def test_every_sublayer_of_a_prefill_equals_the_reference(networks):
    check_layers(*networks, length=21)


def test_chunks_decodes_and_padding_in_one_step_over_a_cache_that_the_cpu_engine_filled(networks):
    """One request crosses a C128 block, one a page, one begins; then all decode."""
    sequences = Sequences(*networks, ids={2: random_ids(CONFIG, 132, 2), 0: random_ids(CONFIG, 260, 3),
                                          3: random_ids(CONFIG, 10, 4)})  # fmt: skip
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    sequences.check_step({2: 4, 0: 3, 3: 5}, num_rows=16)
    sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4)
