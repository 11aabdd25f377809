"""benchmarks/projection.py against numbers that were computed by hand or stand in docs/model.md."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def projection():
    spec = importlib.util.spec_from_file_location("projection", ROOT / "benchmarks/projection.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["projection"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["projection"]


def all_stages(projection, name, batch, context):
    config = projection.load(name)
    layers = config["compress_ratios"][: config["num_hidden_layers"]]
    return [stage for ratio in layers for stage in projection.stages(config, ratio, batch, context, 1)]


def test_a_stage_takes_as_long_as_the_longest_of_its_three_floors(projection):
    on = projection.gpu("card", 2.0, 80, 100, 200, 50)
    half = projection.Assumed(memory=0.5, matmul=0.5, nvlink=0.5)
    for moved, flops, sent, us in (
        (4e6, {"bf16": 1e8}, 0.0, 2.0),  # 4 MB at 2 TB/s
        (2e6, {"bf16": 2e8, "fp8": 2e8}, 0.0, 3.0),  # 2 us and 1 us of products
        (2e6, {"tf32": 1e8}, 5e5, 10.0),  # 0.5 MB at 50 GB/s
    ):
        stage = projection.Stage("some", moved, flops, sent)
        assert stage.seconds(on) == pytest.approx(us * 1e-6)
        assert stage.seconds(on, half) == pytest.approx(2 * us * 1e-6)


@pytest.mark.parametrize(
    ("name", "expert", "queries"), [("pro", 35_094_528, 6_812_489_760), ("flash", 13_369_344, 1_623_294_720)]
)
def test_weights_have_the_bytes_of_the_checkpoint(projection, name, expert, queries):
    config = projection.load(name)
    assert projection.expert_bytes(config) == expert
    heads, rank = config["num_attention_heads"] * config["head_dim"], config["q_lora_rank"]
    layers = config["num_hidden_layers"]
    assert layers * (projection.fp8(rank, config["hidden_size"]) + projection.fp8(heads, rank)) == queries


@pytest.mark.parametrize(("name", "total"), [("pro", 850_748_205_004), ("flash", 156_015_698_140)])
def test_all_weights_are_those_of_the_index_but_for_norms_biases_and_the_token_table(projection, name, total):
    config = projection.load(name)
    assert 0 < total - projection.weight_bytes(config, 1) < 40_000_000
    spread = projection.weight_bytes(config, 1) - projection.weight_bytes(config, 8)
    experts = config["num_hidden_layers"] * config["n_routed_experts"] * projection.expert_bytes(config)
    assert spread == pytest.approx(experts * 7 / 8)


# docs/model.md section 13: GFLOP of a token with the head, MB of stored rows that it reads.
@pytest.mark.parametrize(("name", "gflop"), [("pro", 108.6), ("flash", 29.1)])
def test_the_flops_of_a_token(projection, name, gflop):
    config = projection.load(name)
    flops = sum(sum(stage.flops.values()) for stage in all_stages(projection, name, 1, 4096))
    head = 2 * config["vocab_size"] * config["hidden_size"]
    assert (flops + head) / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize(("name", "context", "megabytes"), [
    ("pro", 32_768, 44), ("flash", 32_768, 24), ("pro", 1 << 20, 706), ("flash", 1 << 20, 480),
])  # fmt: skip
def test_the_stored_rows_that_a_token_reads(projection, name, context, megabytes):
    config = projection.load(name)
    heads = 4 * config["num_attention_heads"] * config["head_dim"]
    moved = sum(stage.moved_bytes for stage in all_stages(projection, name, 1, context) if stage.name == "indexer")
    attention = [stage for stage in all_stages(projection, name, 1, context) if stage.name == "attention"]
    moved += sum(stage.moved_bytes - heads for stage in attention)
    assert moved / 1e6 == pytest.approx(megabytes, abs=0.6)


def test_the_cache_of_a_request_is_the_growing_part_and_the_windows(projection):
    # docs/model.md section 14: 5,031.4 bytes a token and 61 windows of 74,752 bytes.
    assert projection.cache_bytes(projection.load("pro"), 1 << 20) == pytest.approx(
        5031.4375 * (1 << 20) + 61 * 74_752, rel=1e-6
    )


def test_how_many_experts_and_ranks_are_hit(projection):
    config = {"n_routed_experts": 4, "num_experts_per_tok": 1}
    assert projection.experts_hit(config, 1) == 1
    assert projection.experts_hit(config, 2) == pytest.approx(4 * (1 - 9 / 16))
    assert projection.ranks_hit(config, 1) == 0
    assert projection.ranks_hit(config, 2) == pytest.approx(1 / 2)
    assert projection.ranks_hit(config | {"num_experts_per_tok": 2}, 2) == pytest.approx(1 - 1 / 6)


def test_a_step_is_its_layers_the_head_and_the_launches(projection):
    config, on = projection.load("flash"), projection.GB300
    layers = {
        ratio: sum(stage.seconds(on) for stage in projection.stages(config, ratio, 16, 8192, 4))
        for ratio in (0, 4, 128)
    }
    head = (2 * 129_280 * 4096 + 16 * (2 * 4096 + 4 * 129_280)) / 8e12
    floor = 2 * layers[0] + 21 * layers[4] + 20 * layers[128] + head
    assert projection.step_seconds(config, on, 16, 8192, 4) == pytest.approx(floor)
    launches = projection.Assumed(1.0, 1.0, 1.0, launch_s=1e-6, launches=10)
    assert projection.step_seconds(config, on, 16, 8192, 4, launches) == pytest.approx(floor + 430e-6)


def test_the_document_has_the_tables_that_the_script_prints(projection):
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert "\n".join(projection.tables()).rstrip() in text
