"""POST /generate and the other routes that SGLang's clients use."""

import asyncio
import json
from itertools import pairwise

import msgspec
import pytest
from support.api import STATS, ids_answer

from dsv4serve.api.probe import Probe
from dsv4serve.types import EngineUnavailable, FinishReason, RequestOutput, TokenLogprobs


def generate(server, **fields):
    response = server.client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def with_logprobs(server, text):
    """Every token has its id / 1000 as log probability, and itself and id 7 as the best."""
    ids = server.tokenizer.encode(text)

    def entry(token_id):
        return TokenLogprobs(-token_id / 1000, [token_id, 7], [-token_id / 1000, -9.0])

    def answer(request):
        outputs = ids_answer(ids)(request)
        for output in outputs:
            output.logprobs = [entry(token_id) for token_id in output.token_ids]
        if request.sampling.num_prompt_logprobs is not None:
            outputs[0].prompt_logprobs = [entry(token_id) for token_id in request.prompt_ids[1:]]
        return outputs

    server.engine.answer = answer
    return ids


def test_text_and_ids(server):
    ids = server.tokenizer.encode("Hello world")
    server.say("Hello world", cached=1)
    for prompt in ({"text": "Hi"}, {"input_ids": server.tokenizer.encode("Hi")}):
        result = generate(server, **prompt, rid="abc", sampling_params={"temperature": 0.5})
        assert result["text"] == "Hello world"
        assert result["output_ids"] == [*ids, 1]
        meta = result["meta_info"]
        assert meta.pop("e2e_latency") > 0
        assert meta == {
            "id": "abc",
            "finish_reason": {"type": "stop", "matched": 1},
            "prompt_tokens": len(server.tokenizer.encode("Hi")),
            "completion_tokens": len(ids) + 1,
            "cached_tokens": 1,
        }
        request = server.engine.submitted[-1]
        assert request.prompt_ids == server.tokenizer.encode("Hi")
        assert (request.sampling.max_tokens, request.sampling.temperature) == (128, 0.5)


def test_several_prompts_and_choices_are_a_list(server):
    assert len(generate(server, text=["a", "b"])) == 2
    assert len(generate(server, input_ids=[[5], [6]], sampling_params={"n": 2})) == 4
    assert len(generate(server, text="a", sampling_params={"n": 3})) == 3
    assert len(generate(server, text=["a"])) == 1


def test_sampling_params_mean_what_they_mean_elsewhere(server):
    params = {"max_new_tokens": 9, "min_new_tokens": 2, "sampling_seed": 4, "top_k": 5, "top_p": 0.5, "min_p": 0.1}
    params |= {"stop": "x", "stop_token_ids": [8], "ignore_eos": True, "logit_bias": {"3": 1}}
    params |= {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    generate(server, text="a", sampling_params=params, priority=3, cache_salt="s")
    request, sampling = server.engine.submitted[-1], server.engine.submitted[-1].sampling
    assert (request.priority, bool(request.cache_salt)) == (3, True)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed, sampling.top_k) == (9, 2, 4, 5)
    assert (sampling.top_p, sampling.min_p, sampling.stop_token_ids, sampling.ignore_eos) == (0.5, 0.1, (8,), True)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, 0.25)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, {3: 1.0})


def test_log_probabilities(server):
    ids = with_logprobs(server, "Hello world")
    prompt = server.tokenizer.encode("One two three")
    plain = generate(server, text="One two three", return_logprob=True)["meta_info"]
    assert plain["output_token_logprobs"][: len(ids)] == [[-i / 1000, i, None] for i in ids]
    assert plain["input_token_logprobs"] == []
    assert "output_top_logprobs" not in plain
    fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    result = generate(server, text="One two three", **fields)
    full = result["meta_info"]
    texts = [server.tokenizer.decode([i]) for i in prompt]
    first, *rest = [[-i / 1000, i, text] for i, text in zip(prompt, texts, strict=True)]
    assert full["input_token_logprobs"] == [[None, *first[1:]], *rest]
    assert full["input_top_logprobs"][0] is None
    assert full["input_top_logprobs"][1][1] == [-9.0, 7, server.tokenizer.decode([7])]
    assert len(full["output_top_logprobs"]) == len(ids) + 1
    assert result["text"] == "Hello world"  # without the prompt
    fields["logprob_start_len"] = 2
    assert generate(server, text="One two three", **fields)["meta_info"]["input_token_logprobs"] == rest[1:]
    scored = generate(server, text="One two three", sampling_params={"max_new_tokens": 0}, **fields)
    assert (scored["text"], scored["output_ids"]) == ("", [])
    assert scored["meta_info"]["input_token_logprobs"] == rest[1:]
    assert scored["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("fields", [{"text": "a"}, {"text": ["a", "b"]}])
def test_chunks_of_a_stream_have_all_so_far(server, fields):
    server.say("Hello wide world")
    whole = generate(server, **fields)
    response = server.client.post("/generate", json={**fields, "stream": True})
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    for index, expected in enumerate(whole if isinstance(whole, list) else [whole]):
        own = [chunk for chunk in chunks if chunk.get("index", 0) == index]
        assert len(own) > 2
        for before, after in pairwise(own):
            assert after["text"].startswith(before["text"])
            assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert before["meta_info"]["finish_reason"] is None
        last = own[-1]
        assert (last["text"], last["output_ids"]) == (expected["text"], expected["output_ids"])
        assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [5]}, "text"),
        ({"text": 5}, "text"),
        ({"input_ids": [[5], [-1]]}, "input_ids.1.0"),
        ({"input_ids": []}, "input_ids"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": "1"}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [1, -1]}}, "sampling_params.stop_token_ids.1"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 99}, "top_logprobs_num"),
        ({"text": "a", "rid": ["a"]}, "rid"),
    ],
)
def test_wrong_fields_are_named_as_they_are_called_here(server, fields, param):
    response = server.client.post("/generate", json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_unknown_sampling_params_are_named(server):
    response = server.client.post("/generate", json={"text": "a", "sampling_params": {"max_tokens": 5}})
    assert response.headers["x-ignored-fields"] == "sampling_params.max_tokens"


def test_model_info(server):
    info = server.client.get("/model_info").json()
    assert (info["served_model_name"], info["max_model_len"], info["eos_token_id"]) == ("demo", 4096, 1)
    assert info["is_generation"] is True
    assert info["effort_contract"] == "preview"


def test_health_generate(serve):
    server = serve(api_key=("secret",))  # it needs none
    assert server.client.get("/health_generate").status_code == 200
    request = server.engine.submitted[-1]
    assert (len(request.prompt_ids), request.sampling.max_tokens) == (1, 1)
    error = RequestOutput(request_id="", finish_reason=FinishReason.ERROR, error="broken")
    server.engine.answer = lambda request: [error]
    assert server.client.get("/health_generate").status_code == 503


class Stuck:
    """An engine that gives no token for the probe; `others` get theirs."""

    def __init__(self, others):
        self.others, self.num_asked, self.num_submitted = others, 0, 0

    async def stats(self):
        self.num_asked += 1
        if self.others is None:
            raise EngineUnavailable("no engine")
        return msgspec.structs.replace(STATS, num_generated_tokens=5 + self.others * self.num_asked)

    async def submit(self, request):
        self.num_submitted += 1
        await asyncio.Event().wait()
        yield RequestOutput(request_id=request.request_id)


@pytest.mark.parametrize(("others", "works"), [(0, False), (3, True), (None, False)])
def test_a_probe_that_gets_no_token_looks_at_the_others(monkeypatch, others, works):
    monkeypatch.setattr("dsv4serve.api.probe.WAIT_S", 0.05)
    engine = Stuck(others)
    assert asyncio.run(Probe(engine).works()) is works


def test_who_asks_meanwhile_shares_the_attempt(monkeypatch):
    monkeypatch.setattr("dsv4serve.api.probe.WAIT_S", 0.05)
    engine = Stuck(3)

    async def ask():
        probe = Probe(engine)
        return await asyncio.gather(*(probe.works() for _ in range(5)))

    assert asyncio.run(ask()) == [True] * 5
    assert engine.num_submitted == 1
