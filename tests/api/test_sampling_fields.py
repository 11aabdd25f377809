"""Log probabilities, penalties, bias, bans, echo, FIM and token ids: what arrives at the engine and what goes back."""

import openai
import orjson
import pytest
from support.api import events, wait_for

from dsv4serve.types import FinishReason, RequestOutput, TokenLogprobs

MESSAGES = [{"role": "user", "content": "Hi"}]
DSML, END_THINK = 128825, 128822


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def told(index: int, token: int, num_top: int) -> TokenLogprobs:
    """Made-up log probabilities: the token itself is the second best."""
    return TokenLogprobs(
        -0.5 - index, [token + 1, token, token + 2][:num_top], [-0.25 - index, -0.5 - index, -9.0][:num_top]
    )


def say(server, text: str, group: int = 1) -> list[int]:
    """Make the engine answer `text` and EOS with log probabilities, as many as were asked for; returns the ids."""
    ids = [*server.tokenizer.encode(text), 1]

    def answer(request):
        asked, outputs = request.sampling, []
        for first in range(0, len(ids), group):
            part = ids[first : first + group]
            output = RequestOutput(request_id=request.request_id, token_ids=part)
            if asked.num_logprobs is not None:
                output.logprobs = [told(first + n, token, asked.num_logprobs) for n, token in enumerate(part)]
            outputs.append(output)
        if asked.num_prompt_logprobs is not None:
            following = enumerate(request.prompt_ids[1:])
            outputs[0].prompt_logprobs = [told(n, token, asked.num_prompt_logprobs) for n, token in following]
        outputs[-1].finish_reason, outputs[-1].stop_token_id = FinishReason.STOP, 1
        return outputs

    server.engine.answer = answer
    return ids


def complete(server, **fields):
    return server.client.post("/v1/completions", json={"prompt": "One two", **fields})


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("top", [None, 2])
def test_chat_logprobs_have_one_entry_per_generated_token(server, client, group, top):
    ids = say(server, "Why?</think>Hello 🜂 you", group)
    fields = {} if top is None else {"top_logprobs": top}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, **fields)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == len(ids) == answer.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == server.tokenizer.decode(ids)
    assert [entry.logprob for entry in entries] == [-0.5 - n for n in range(len(ids))]
    assert entries[-1].token == "<｜end▁of▁sentence｜>"
    for index, entry in enumerate(entries):
        assert [best.logprob for best in entry.top_logprobs] == [-0.25 - index, -0.5 - index][: top or 0]
        assert not top or entry.top_logprobs[1].bytes == entry.bytes
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, stream=True, **fields)
    chunks = [chunk.choices[0] for chunk in stream]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in entries]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Hello 🜂 you"


def test_without_the_fields_nothing_is_asked_for_or_sent(server):
    choice = server.chat().json()["choices"][0]
    assert choice["logprobs"] is None
    assert not {"token_ids", "prompt_token_ids"} & set(choice)
    asked = server.engine.submitted[0].sampling
    assert (asked.num_logprobs, asked.num_prompt_logprobs, asked.needs_history) == (None, None, False)
    assert (asked.repetition_penalty, asked.logit_bias, asked.bad_words, asked.thinking_budget) == (1, {}, (), None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_logprobs_too(server, stream):
    say(server, "r</think>one END two", group=100)
    response = server.chat(stop="END", logprobs=True, return_token_ids=True, stream=stream)
    choices = [c["choices"][0] for c in events(response)] if stream else response.json()["choices"]
    ids = server.tokenizer.encode("r</think>one END")
    assert [token for choice in choices for token in choice.get("token_ids", [])] == ids
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == len(ids)


def test_completion_logprobs_with_the_openai_client(server, client):
    ids = say(server, " a 🜂 b")
    answer = client.completions.create(model="demo", prompt="x", logprobs=2).choices[0]
    got = answer.logprobs
    texts = [server.tokenizer.token_bytes[token].decode("utf-8", "replace") for token in ids]
    assert got.tokens == texts
    assert got.token_logprobs == [-0.5 - n for n in range(len(ids))]
    assert all(top[text] <= 0 for top, text in zip(got.top_logprobs, texts, strict=True))
    assert got.text_offset[-1] == len(answer.text)
    assert [answer.text[offset] for offset, text in zip(got.text_offset, texts, strict=True) if text == " b"] == [" "]
    stream = list(client.completions.create(model="demo", prompt="x", logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in getattr(part, name)] == getattr(got, name)
    got = client.completions.create(model="demo", prompt="x", logprobs=0).choices[0].logprobs
    assert [len(top) for top in got.top_logprobs] == [1] * len(ids)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 16])
def test_echo_puts_the_prompt_and_its_logprobs_in_front(server, stream, max_tokens):
    ids = say(server, " three")
    response = complete(server, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream, return_token_ids=True, n=2)
    body = events(response) if stream else [response.json()]
    prompt = server.tokenizer.encode("One two")
    outputs = ids if max_tokens else []
    for index in range(2):
        choices = [c for part in body for c in part["choices"] if c["index"] == index]
        assert "".join(choice["text"] for choice in choices) == "One two" + (" three" if max_tokens else "")
        lists = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = [value for part in lists for value in part["token_logprobs"]]
        assert logprobs == [None, *(-0.5 - n for n in range(len(prompt) - 1)), *(-0.5 - n for n in range(len(outputs)))]
        offsets = [value for part in lists for value in part["text_offset"]]
        assert offsets[: len(prompt) + 1] == ([0, 3, 7] if outputs else [0, 3])
        assert lists[0]["top_logprobs"][0] is None
        assert [token for choice in choices for token in choice.get("token_ids", [])] == outputs
        assert [c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c] == [prompt]
        assert choices[-1]["finish_reason"] == ("stop" if max_tokens else "length")
    asked = server.engine.submitted[0].sampling
    assert (asked.max_tokens, asked.num_prompt_logprobs) == (max_tokens or 1, 1)
    if not stream:
        assert body[0]["usage"]["completion_tokens"] == 2 * len(outputs)


def test_echo_without_logprobs_is_only_text(server):
    say(server, " three")
    choice = complete(server, echo=True).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("One two three", None)
    assert server.engine.submitted[0].sampling.num_prompt_logprobs is None


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_all_fields_arrive_at_the_engine(server, route):
    fields = {
        "frequency_penalty": -1,
        "presence_penalty": 1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 2, "129279": -100},
        "bad_words": ["bad", " bad", "very bad"],
    }
    prompt = {"prompt": "x"} if route == "/v1/completions" else {"messages": MESSAGES}
    assert server.client.post(route, json=prompt | fields).status_code == 200
    asked, encode = server.engine.submitted[0].sampling, server.tokenizer.encode
    assert (asked.frequency_penalty, asked.presence_penalty, asked.repetition_penalty) == (-1, 1.5, 1.2)
    assert asked.logit_bias == {5: 2, 129279: -100}
    assert set(asked.bad_words) == {tuple(encode(text)) for text in ("bad", " bad", "very bad", " very bad")}
    assert asked.needs_history


def test_call_markup_is_banned_where_nobody_reads_calls(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for fields, banned in (({}, (DSML,)), ({"tools": tools}, ()), ({"tools": tools, "tool_choice": "none"}, (DSML,))):
        server.chat(**fields)
        assert server.engine.submitted[-1].sampling.banned_token_ids == banned
    complete(server)
    assert server.engine.submitted[-1].sampling.banned_token_ids == ()


def test_the_reasoning_budget_counts_only_where_reasoning_is_open(server):
    server.chat(thinking_token_budget=0)
    asked = server.engine.submitted[-1].sampling
    assert (asked.thinking_budget, asked.thinking_end_ids[0]) == (0, END_THINK)
    server.chat(thinking_token_budget=5, thinking={"type": "disabled"})
    assert server.engine.submitted[-1].sampling.thinking_budget is None


def test_a_suffix_makes_a_gap_to_fill(server):
    encode = server.tokenizer.encode
    gap = [128801, *encode("def f("), 128800, *encode("return x"), 128802]
    for fields, head in (({}, []), ({"add_special_tokens": True}, [0])):
        complete(server, prompt="def f(", suffix="return x", **fields)
        assert server.engine.submitted[-1].prompt_ids == head + gap
    complete(server, prompt="def f(", suffix="")
    assert server.engine.submitted[-1].prompt_ids == encode("def f(")


def test_no_stop_trim_keeps_the_stop_string(server):
    say(server, "</think>one END two")
    assert server.chat(stop="END", no_stop_trim=True).json()["choices"][0]["message"]["content"] == "one END"


def test_stop_strings_wait_for_min_tokens(server):
    say(server, "a END b END c END d")
    num_tokens = len(server.tokenizer.encode("a END b"))
    answer = complete(server, stop="END", min_tokens=num_tokens).json()
    assert answer["choices"][0]["text"] == "a END b "
    assert complete(server, stop="END").json()["choices"][0]["text"] == "a "
    wait_for(lambda: len(server.engine.aborted) == 2)


def test_defaults_for_all_of_generation_config(serve, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}')
    server = serve()
    server.chat()
    server.chat(top_k=-1, min_p=0, repetition_penalty=1)
    asked = [request.sampling for request in server.engine.submitted]
    assert [(p.top_k, p.min_p, p.repetition_penalty) for p in asked] == [(20, 0.1, 1.05), (0, 0, 1)]


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat/completions", b'"logprobs": 5', "logprobs"),
        ("chat/completions", b'"top_logprobs": 3', "top_logprobs"),
        ("chat/completions", b'"logprobs": true, "top_logprobs": 21', "top_logprobs"),
        ("chat/completions", b'"logprobs": true, "top_logprobs": -1', "top_logprobs"),
        ("chat/completions", b'"echo": true', "echo"),
        ("chat/completions", b'"suffix": "x"', "suffix"),
        ("chat/completions", b'"thinking_token_budget": -1', "thinking_token_budget"),
        ("chat/completions", b'"thinking_token_budget": 1.5', "thinking_token_budget"),
        ("completions", b'"thinking_token_budget": 5', "thinking_token_budget"),
        ("completions", b'"logprobs": true', "logprobs"),
        ("completions", b'"logprobs": 21', "logprobs"),
        ("completions", b'"logprobs": -1', "logprobs"),
        ("completions", b'"echo": true, "suffix": "x"', "echo"),
        ("completions", b'"suffix": ["x"]', "suffix"),
        ("completions", b'"max_tokens": 0', "max_tokens"),
        ("completions", b'"logit_bias": {"129280": 1}', "logit_bias.129280"),
        ("completions", b'"logit_bias": {"5": 101}', "logit_bias.5"),
        ("completions", b'"logit_bias": {"5": "1"}', "logit_bias.5"),
        ("completions", b'"logit_bias": {"5": null}', "logit_bias.5"),
        ("completions", b'"logit_bias": ' + orjson.dumps({str(n): 1 for n in range(1025)}), "logit_bias"),
        ("completions", b'"bad_words": [""]', "bad_words.0"),
        ("completions", b'"bad_words": ["a", 5]', "bad_words.1"),
        ("completions", b'"bad_words": ' + orjson.dumps(["a"] * 129), "bad_words"),
    ],
)
def test_wrong_values_are_400s_that_name_the_field(server, route, fields, param):
    start = b'{"prompt": "x", ' if route == "completions" else b'{"messages": [{"role": "user", "content": "x"}], '
    response = server.client.post(f"/v1/{route}", content=start + fields + b"}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert server.engine.submitted == []


@pytest.mark.parametrize("key", ["a", "-1", "1.5", "", "9999999999"])
def test_keys_of_logit_bias_are_token_ids(server, key):
    response = complete(server, logit_bias={key: 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("logit_bias")
