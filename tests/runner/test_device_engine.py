"""The device engine by Triton's interpreter on CPU tensors: the network, the step over the cache, the runner."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_engine import Sequences, check_generation, check_layers, check_mtp
from support.device_models import CONFIG, both, checkpoint
from support.engine import Engine, greedy
from support.models import random_ids
from torch.testing import assert_close

from dsv4_kernels.metadata.plan import INPUTS
from dsv4serve.model.device import Streams
from dsv4serve.runner import device_step
from dsv4serve.runner.device_batch import bucket_of, empty_inputs, fill_inputs
from dsv4serve.runner.graphs import Bucket, bucket_for, buckets
from dsv4serve.runner.logprobs import BLOCK_ROWS


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cpu"))


def test_every_sublayer_of_a_prefill_equals_the_reference(networks):
    check_layers(*networks, length=21)


def test_the_mtp_block_equals_the_reference_and_its_keys_can_be_had_alone(networks):
    check_mtp(*networks, random_ids(CONFIG, 22, 2))


def test_chunks_decodes_and_padding_in_one_step_over_a_cache_that_the_cpu_engine_filled(networks):
    """One request crosses a C128 block, one a page, one begins; then all decode."""
    sequences = Sequences(*networks, ids={2: random_ids(CONFIG, 132, 2), 0: random_ids(CONFIG, 260, 3),
                                          3: random_ids(CONFIG, 10, 4)})  # fmt: skip
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    sequences.check_step({2: 4, 0: 3, 3: 5}, num_rows=16)
    sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4)


def test_verifies_leave_the_state_behind_each_of_their_rows_in_a_bank_of_its_own(networks):
    """One ends a C128 block with its second row, one is a decode, one a chunk."""
    ids = {2: random_ids(CONFIG, 140, 2), 0: random_ids(CONFIG, 40, 3), 3: random_ids(CONFIG, 20, 4)}
    sequences = Sequences(*networks, ids=ids, num_draft_tokens=3)
    sequences.prefill({2: 126, 0: 30})
    sequences.check_step({2: 4, 0: 1, 3: 6}, num_rows=16)
    sequences.check_step({2: 3, 0: 2, 3: 4}, num_rows=12)


def test_the_runner_gives_the_reference_tokens_and_the_host_sampler_the_same(networks):
    """Three requests arrive one after the other, so that prefill, mixed steps and decodes in buckets of 1, 2 and 4 run.
    One of them wants its logits: its steps are sampled on the host. Alone, without, it gets the same tokens."""
    reference, network = networks
    requests = [greedy(f"r{n}", random_ids(CONFIG, 3 + n, n), 3, return_logits=n == 1) for n in range(3)]
    engine = Engine(network, on_device=True)
    outputs = engine.run(requests, arrivals={"r1": 1, "r2": 2})
    check_generation(reference, requests, outputs)
    rows = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in outputs["r1"].logits])
    assert rows.argmax(-1).tolist() == outputs["r1"].token_ids
    plain = greedy("plain", requests[1].prompt_ids, 3, return_logits=False)
    assert engine.run([plain])["plain"].token_ids == outputs["r1"].token_ids


def test_a_sampled_request_draws_what_the_reference_sampler_draws(networks):
    """The numbers of a request (temperature, filters, random number) reach the device as the host has them."""
    _, network = networks
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "seed": 5}
    prompt = random_ids(CONFIG, 4, 9)
    on_host, on_device = (greedy(name, prompt, 2, return_logits=name == "host", **settings) for name in ("host", "dev"))
    tokens = [Engine(network, on_device=True).run([each])[each.request_id].token_ids for each in (on_host, on_device)]
    assert tokens[0] == tokens[1]


def test_logits_of_prompt_rows_are_those_of_the_rows_whatever_they_are_padded_to(networks):
    """More than one block, the last one of two rows."""
    _, network = networks
    streams = Streams(torch.randn(BLOCK_ROWS + 2, 4, CONFIG.hidden_size, dtype=torch.bfloat16))
    with torch.inference_mode():
        found = Engine(network, on_device=True).runner._logits(streams)
        assert_close(found, network.logits(streams), rtol=1e-5, atol=1e-5)


def test_a_step_that_ran_ahead_of_a_stop_leaves_nothing_to_the_next_request_of_the_slot(networks):
    """One slot. The step behind the stop is submitted before the stop is known; the next request takes its place."""
    _, network = networks
    requests = [greedy(f"r{n}", random_ids(CONFIG, 5, n), 4, return_logits=False) for n in range(2)]
    alone = [Engine(network, on_device=True).run([each])[each.request_id].token_ids for each in requests]
    stopped = greedy("stopped", requests[0].prompt_ids, 4, return_logits=False, stop_token_ids=[alone[0][1]])
    engine = Engine(network, num_slots=1, on_device=True)
    outputs = engine.run([stopped, requests[1]])
    assert outputs["stopped"].token_ids == alone[0][: alone[0].index(alone[0][1]) + 1]
    assert outputs["r1"].token_ids == alone[1]
    assert engine.scheduler.stats().num_steps > len(outputs["stopped"].token_ids) + len(alone[1])


def test_only_steps_with_chunks_launch_the_late_writes_of_window_rows(networks, monkeypatch):
    commits = []
    monkeypatch.setattr(device_step, "commit", lambda *_: commits.append("layer"))
    graphs = Engine(networks[1], on_device=True).runner.graphs
    graphs.eager(Bucket(4, 4))
    assert not commits
    graphs.eager(Bucket(8, 4))
    assert len(commits) == CONFIG.num_hidden_layers


def test_numbers_of_a_step_keep_their_bits():
    inputs = empty_inputs(4, pinned=False)
    fill_inputs(inputs, {"slot": [3, 0], "count": [1, 2], "num_drafts": [0, 1], "seed": [-(2**63), 7],
                         "follows": [True, False], "temperature": [0.7, 0.0], "top_p": [1 - 2**-53, 0.5]})  # fmt: skip
    columns = dict(zip(INPUTS, inputs, strict=True))
    assert columns["slot"].tolist() == [3, 0, -1, -1]
    assert columns["count"].tolist() == [1, 2, 0, 0]
    assert columns["num_drafts"].tolist() == [0, 1, 0, 0]
    assert columns["seed"].tolist() == [-(2**63), 7, 0, 0]
    assert columns["follows"].tolist() == [1, 0, 0, 0]
    assert columns["temperature"].view(torch.float64).tolist() == [0.7, 0, 0, 0]
    assert columns["top_p"].view(torch.float64).tolist() == [1 - 2**-53, 0.5, 0, 0]
    fill_inputs(inputs, {"slot": [1]})
    assert inputs[INPUTS.index("slot")].tolist() == [1, -1, -1, -1]
    assert not inputs[1:].any()


def test_sizes_are_padded_to_few_buckets():
    assert [bucket_of(size) for size in (1, 2, 3, 9, 255, 256, 257, 1000)] == [1, 2, 4, 16, 256, 256, 512, 1024]
    decodes, chunks = [1, 2, 4, 8, 16, 32], [64, 128, 256, 512, 768]
    plain = [Bucket(size, size) for size in decodes] + [Bucket(size, 32) for size in chunks]
    assert buckets(20, 700, 0) == plain
    drafts = [Bucket(2 * size, size, 1) for size in decodes] + [Bucket(3 * size, size, 2) for size in decodes]
    assert buckets(20, 700, 2) == plain + drafts + [Bucket(size, 32, 2) for size in chunks[1:]]
    assert {
        bucket_for([1 + extra] + [1 + num_drafts] * others, 20, num_drafts, 2)
        for extra in range(640)
        for others in range(20)
        for num_drafts in range(3)
    } == set(buckets(20, 700, 2))
