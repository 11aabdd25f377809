"""The engine that benchmarks/ablation.py takes apart computes the same, by the interpreter."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_engine import Sequences, _planes
from support.device_models import RAW
from support.models import random_ids

from dsv4serve.config import EngineConfig, ExpertActivations, ModelConfig, Numerics
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import dummy_weights, load_weights, write_checkpoint
from dsv4serve.weights.device_loader import load_device_weights
from dsv4serve.weights.export import exported_config
from dsv4serve.weights.layout import official_view

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from unfused import SWITCHES, unfused

# Groups of the output projection that are whole blocks of scales, as the released models have.
SIZES = {**RAW, "o_lora_rank": 128}
CONFIG = ModelConfig.from_dict(exported_config(SIZES, quantized=True))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfused") / "model"
    write_checkpoint(folder, SIZES, functools.partial(official_view, dummy_weights(CONFIG, 3)), quantized=True)
    config = EngineConfig(model=folder)
    weights = load_weights(config, CONFIG)
    references = [Transformer(CONFIG, weights, Numerics.OFFICIAL, kind) for kind in ExpertActivations]
    device_weights = load_device_weights(config, CONFIG, torch.device("cpu"), unpacked=True)
    return dict(zip(ExpertActivations, references, strict=True)), DeviceTransformer(CONFIG, device_weights)


class KeptSpares(Sequences):
    """The last row of each pool, where unfused steps put what is no entry, is put back after each of them."""

    def advance_device(self, counts, num_rows):
        pools = self.found.pools.layers
        last = [plane[-1] for layer in pools for plane in _planes(layer)]
        last += [layer.c128_state[-1] for layer in pools if layer.c128_state is not None]
        saved = [row.clone() for row in last]
        logits = super().advance_device(counts, num_rows)
        for row, before in zip(last, saved, strict=True):
            row.copy_(before)
        return logits


@pytest.mark.parametrize("off", [*((switch,) for switch in SWITCHES), SWITCHES], ids="+".join)
def test_chunks_decodes_and_padding_compute_the_same_unfused(networks, off):
    """One request crosses a C128 block, one a page, one begins; then all decode, and one closes an entry."""
    references, network = networks
    reference = references[ExpertActivations.BF16 if "bf16-experts" in off else ExpertActivations.FP8]
    sequences = KeptSpares(reference, network, ids={2: random_ids(CONFIG, 132, 2), 0: random_ids(CONFIG, 260, 3),
                                                    3: random_ids(CONFIG, 10, 4)})  # fmt: skip
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    with unfused(off, network):
        sequences.check_step({2: 4, 0: 3, 3: 6}, num_rows=16)
        sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4)
        sequences.check_step({3: 1, 0: 1}, num_rows=4)
