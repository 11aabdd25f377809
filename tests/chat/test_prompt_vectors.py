"""Prompts against vectors made with DeepSeek's own encoder and recipe package."""

import hashlib
import json
from pathlib import Path

import pytest

from dsv4serve.chat.effort import TEXTS
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tools import parse_tools, response_format_text
from dsv4serve.config import EffortContract

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "chat-vectors.json").read_text(encoding="utf-8"))
PROMPTS = {vector["id"]: vector for vector in VECTORS["prompt"]}


def segments_of(vector):
    request = vector["request"]
    contract = EffortContract.PREVIEW if vector["contract"] == "any" else EffortContract(vector["contract"])
    tier = request.get("reasoning_effort")  # the encoder's own tier, not yet the API's value
    answer = request.get("response_format") and {"type": request["response_format"]}
    if "response_schema" in request:
        answer = {"type": "json_schema", "json_schema": {"schema": request["response_schema"]}}
    return render(
        parse_messages(request["messages"], developer_role="user"),
        request["thinking"],
        tools=parse_tools(request.get("tools")),
        effort=TEXTS[contract][tier] if tier else "",
        response_format=response_format_text(answer),
        drop_thinking=request.get("drop_thinking", True),
        require_call=request.get("tool_choice") == "required",
    )


def test_there_are_28_vectors():
    assert len(PROMPTS) == 28


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_equals_the_official_encoders(name, tokenizer):
    vector = PROMPTS[name]
    segments = segments_of(vector)
    assert "".join(segments) == vector["prompt"]
    ids = tokenizer.encode_segments(segments)
    assert len(ids) == vector["n_tokens"]
    assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest() == vector["token_ids_sha256"]
    if not vector.get("injection_safe"):  # of benign text the ids are those of a plain encode
        assert tokenizer.encode(vector["prompt"]) == ids
