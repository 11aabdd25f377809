"""Constrained requests in the engine: what they generate matches, and nobody else notices."""

import json
import re

import jsonschema
import pytest
from support.constrained import END_THINK, MARKER_ID, VOCABULARY, decode, schema, tag
from support.engine import Engine, greedy
from support.models import random_ids, small_config, small_transformer

from dsv4serve.constrained.compiler import Compiler
from dsv4serve.types import FinishReason, InvalidRequest, Request, RequestOutput

TRANSFORMER = small_transformer(small_config(), 1)
CONFIG = TRANSFORMER.config
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def engine(**settings) -> Engine:
    return Engine(TRANSFORMER, read_vocabulary=lambda: VOCABULARY, **settings)


def request(name: str, constraint, num_prompt: int = 20, max_tokens: int = 200, **sampling) -> Request:
    seed = sum(map(ord, name))
    sampling = {"temperature": 1.0, "seed": seed, "ignore_eos": False, "constraint": constraint, **sampling}
    return greedy(name, random_ids(CONFIG, num_prompt, seed), max_tokens, **sampling)


def text_of(output: RequestOutput) -> str:
    assert output.finish_reason is FinishReason.STOP, decode(output.token_ids)
    return decode(output.token_ids[:-1])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_random_models_write_what_the_schema_says(temperature: float) -> None:
    requests = [request(f"r{n}", schema(PERSON), temperature=temperature) for n in range(2)]
    for output in engine().run(requests).values():
        jsonschema.validate(json.loads(text_of(output)), PERSON)


@pytest.mark.parametrize(
    ("format", "pattern"),
    [
        ({"type": "regex", "pattern": "[a-c]{3}-(0|1)+9"}, "[a-c]{3}-(0|1)+9"),
        ({"type": "grammar", "grammar": 'root ::= "a" root "b" | "c"'}, "a*cb*"),
        ({"type": "or", "elements": [{"type": "const_string", "value": text} for text in ("yes", "no")]}, "yes|no"),
    ],
)
def test_regexes_grammars_and_choices(format: dict, pattern: str) -> None:
    outputs = engine().run([request(f"r{n}", tag(format)) for n in range(4)])
    assert all(re.fullmatch(pattern, text_of(output)) for output in outputs.values())


def test_a_batch_of_constrained_and_free_requests_equals_each_alone() -> None:
    digits = schema({"type": "array", "items": {"enum": [0, 1, 2]}, "minItems": 2, "maxItems": 3})
    requests = [request(f"c{n}", digits, num_prompt=20 + 120 * n) for n in range(3)]
    requests += [request("words", tag({"type": "regex", "pattern": "[a-z]{9}"})), request("free", None, max_tokens=12)]
    together = engine(num_slots=5, max_step_tokens=256).run(requests, arrivals={"c1": 2, "free": 3})
    for one in requests:
        alone = engine(num_slots=5).run([one])
        assert alone[one.request_id].token_ids == together[one.request_id].token_ids


def test_a_retraction_inside_a_grammar_changes_nothing() -> None:
    long = tag({"type": "regex", "pattern": "([a-c][0-3]){9}x"})
    requests = [request(f"r{n}", long, num_prompt=250 + n) for n in range(3)]
    roomy = engine(num_slots=3, num_pages=24, prefix_cache=False).run(requests)
    tight = engine(num_slots=3, num_pages=4, prefix_cache=False, max_model_len=600)
    outputs = tight.run(requests)
    assert tight.scheduler.stats().num_retractions >= 1
    assert [o.token_ids for o in outputs.values()] == [o.token_ids for o in roomy.values()]
    assert all(re.fullmatch("([a-c][0-3]){9}x", text_of(output)) for output in outputs.values())


@pytest.mark.parametrize(
    "format_of",
    [
        lambda text: {"type": "any_text"},
        lambda text: {"type": "const_string", "value": text + "and so on"},
        lambda text: {"type": "regex", "pattern": re.escape(text[:5]) + r"[^\u0000]*"},
    ],
)
def test_a_greedy_output_that_matches_anyway_stays_the_same(format_of) -> None:
    never = tuple(i for i, text in enumerate(VOCABULARY.token_bytes) if not text or i == MARKER_ID)
    sampling = {"temperature": 0.0, "max_tokens": 12, "banned_token_ids": never}
    free = engine().run([request("r", None, **sampling)])["r"].token_ids
    constraint = tag(format_of(decode(free)))
    assert engine().run([request("r", constraint, **sampling)])["r"].token_ids == free


def test_the_grammar_begins_behind_the_reasoning() -> None:
    bias = {END_THINK: 4.0}
    requests = [request(f"r{n}", schema(PERSON, after_id=END_THINK), logit_bias=bias, max_tokens=400) for n in range(3)]
    outputs = engine().run(requests)
    for output in outputs.values():
        end = output.token_ids.index(END_THINK)
        jsonschema.validate(json.loads(decode(output.token_ids[end + 1 : -1])), PERSON)
    assert any(output.token_ids.index(END_THINK) > 0 for output in outputs.values())


def test_a_grammar_is_stronger_than_bans() -> None:
    """Bans that leave nothing must not end the engine, nor break the grammar."""
    yes = tag({"type": "const_string", "value": "yes"})
    ban = tuple(range(4, 96))
    assert text_of(engine().run([request("r", yes, banned_token_ids=ban)])["r"]) == "yes"


def test_a_grammar_that_becomes_too_slow_ends_its_own_request(monkeypatch) -> None:
    """Ambiguous repeats take longer with every token, and every step waits for the slowest row."""
    monkeypatch.setattr("dsv4serve.constrained.masks.MAX_TOKEN_S", 0.001)
    slow = tag({"type": "regex", "pattern": "((a*)*)*b"})
    requests = [request("slow", slow, banned_token_ids=(VOCABULARY.token_bytes.index(b"b"),), max_tokens=400)]
    requests.append(request("other", tag({"type": "regex", "pattern": "[a-z]{9}"})))
    outputs = engine().run(requests)
    assert outputs["slow"].finish_reason is FinishReason.ERROR
    assert re.fullmatch("[a-z]{9}", text_of(outputs["other"]))


@pytest.mark.parametrize(("text", "kind"), [("x", "parser"), ("\N{GRINNING FACE}", "lexer")])
def test_a_wrong_grammar_is_refused_with_what_is_wrong_whatever_its_characters(text: str, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"can be enforced: EBNF {kind} error at line 1, column 1"):
        Compiler(lambda: VOCABULARY).compile(tag({"type": "grammar", "grammar": text}))
