"""A wrong scale in the MTP block changes no token; the alarm of the engine sees it.

The model is made so that its acceptance is known: what layers add to the streams is small, and the MTP block's own
input is the token's embedding, so block and main model agree in most of what they predict.
"""

from __future__ import annotations

import logging

import pytest
import torch
import zmq
from support.models import random_ids, small_config

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig, Numerics
from dsv4serve.engine.core import EngineCore
from dsv4serve.engine.messages import EngineStats, GetStats, Submit, decode_from_engine, encode
from dsv4serve.engine.process import build_core
from dsv4serve.memory import CacheLayout, CapacityPlan
from dsv4serve.model.transformer import Transformer
from dsv4serve.obs.acceptance import MIN_HISTORY, WINDOW
from dsv4serve.runner import Runner, build_runner
from dsv4serve.types import Request, SamplingParams
from dsv4serve.weights.dummy import dummy_weights
from tools.demo_model.offline import prompt_ids
from tools.demo_model.probing import held_out

CONFIG = small_config(num_hidden_layers=2, compress_ratios=[4, 0, 0], num_hash_layers=0)


def agreeing_transformer() -> Transformer:
    weights = dummy_weights(CONFIG, 5)
    for name, value in weights.items():
        if name.endswith(("attn.wo_b.weight", "experts.w2")):
            value.mul_(0.1)
    identity = torch.eye(CONFIG.hidden_size)
    weights["mtp.0.e_proj.weight"].copy_(identity)
    weights["mtp.0.enorm.weight"].fill_(1.0)
    weights["mtp.0.h_proj.weight"].mul_(0.05)
    weights["mtp.0.norm.weight"].copy_(weights["norm.weight"])
    return Transformer(CONFIG, weights, Numerics.EXACT)


class Server:
    """The step loop behind its socket, one step at a time."""

    def __init__(
        self, endpoint: str, transformer: Transformer, requests: list[Request], numerics=Numerics.EXACT, num_slots=2
    ) -> None:
        model = transformer.config
        layout = CacheLayout.build(model, numerics, 2)
        plan = CapacityPlan(layout, num_slots, 40, 2, model.max_position_embeddings)
        config = EngineConfig(num_draft_tokens=2, draft_mode="fixed")
        self.core: EngineCore = build_core(endpoint, config, lambda config: Runner(transformer, plan))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        for request in requests:
            self._socket.send(encode(Submit(request)))
        while self.core._scheduler.stats().num_running < num_slots:
            self.step()

    def step(self) -> None:
        self.core._receive()
        self.core._step()

    def stats(self) -> EngineStats:
        self._socket.send(encode(GetStats()))
        while True:
            while not self._socket.poll(10):
                self.step()
            message = decode_from_engine(self._socket.recv())
            if isinstance(message, EngineStats):
                return message

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()
        self.core.close()


def request(temperature: float, prompt: list[int], index: int = 0, **sampling) -> Request:
    params = SamplingParams(temperature=temperature, seed=index, **sampling)
    return Request(request_id=f"t{temperature}-{index}", prompt_ids=prompt, sampling=params)


WRONG = 3 * 2.0**4  # a scale that is no power of two, spilled over its neighbour's exponent


def check_alarm(server: Server, transformer: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    """The alarm is silent; with wrong scales it comes within 200 steps; with the right ones it ends within 200."""
    caplog.set_level(logging.INFO, "dsv4serve.engine.core")
    caplog.clear()
    while server.core._scheduler.stats().num_drafted[0] < MIN_HISTORY + 2 * WINDOW:
        server.step()
    before = server.stats()
    assert before.num_accepted[0] / before.num_drafted[0] > 0.6
    assert (before.is_accept_rate_low, before.num_accept_alarms, caplog.records) == (False, 0, [])

    assert transformer.mtp is not None
    one_group = transformer.mtp.block.attention.wo_a[:1]  # of the grouped projection
    one_group.mul_(WRONG)
    steps = 0
    while not server.core._stats().is_accept_rate_low and steps < 200:
        server.step()
        steps += 1
    after = server.stats()
    assert (after.is_accept_rate_low, after.num_accept_alarms) == (True, 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the accept rate of drafts fell: 0.")

    one_group.div_(WRONG)
    for _ in range(200):
        server.step()
    assert not server.stats().is_accept_rate_low
    assert "as before" in caplog.records[-1].getMessage()
    server.close()


def test_a_wrong_scale_of_the_output_projection_is_noticed_within_200_steps(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = agreeing_transformer()
    prompt = random_ids(CONFIG, 20, 1)
    requests = [request(temperature, prompt, max_tokens=4000, ignore_eos=True) for temperature in (0.0, 1.0)]
    check_alarm(Server(f"ipc://{tmp_path}/engine", transformer, requests), transformer, caplog)


def test_on_the_demo_model_too(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Stories, half of them sampled, one at a time: each pass of the block has one row."""
    config = EngineConfig(numerics=Numerics.EXACT, num_draft_tokens=2, cache_bytes=1 << 28)
    tokenizer = ChatTokenizer(config.model)
    transformer = build_runner(config).transformer
    requests = [
        request(index % 2 * 1.0, prompt_ids(tokenizer, probe), index, max_tokens=probe.max_tokens)
        for index, probe in enumerate(held_out("stories", 40))
    ]
    server = Server(f"ipc://{tmp_path}/engine", transformer, requests, config.numerics, num_slots=1)
    check_alarm(server, transformer, caplog)
