"""Patterns of schemas mean to xgrammar what they mean to everybody, once they are written as it reads them right."""

import itertools
import json
import random
import re

import pytest
import xgrammar

from dsv4serve.constrained.schemas import FORMATS, exact_pattern, with_exact_strings

END = 255  # never part of UTF-8
TEXTS = ["".join(letters) for length in range(6) for letters in itertools.product("ab?", repeat=length)]
BYTES = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], stop_token_ids=[END])
COMPILER = xgrammar.GrammarCompiler(BYTES, max_threads=1, cache_enabled=False)


def compiled(schema):
    return COMPILER.compile_grammar(xgrammar.Grammar.from_json_schema(json.dumps(with_exact_strings(schema))))


def accepts(grammar, text):
    matcher = xgrammar.GrammarMatcher(grammar)
    return matcher.accept_string(json.dumps(text)) and matcher.accept_token(END)


def random_pattern(draw, depth=3):
    if depth == 0:
        return draw.choice(["a", "b", "[ab]", "[)?a]", r"\?", "a+", "b*", "b{1,2}"])
    inside = [random_pattern(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    group = draw.choice(["({})", "(?:{})"]).format(draw.choice(["", "", "|"]).join(inside))
    return group + draw.choice(["", "?", "?", "*", "+", "{0,2}", "{2}"])


@pytest.mark.parametrize("seed", range(60))
def test_random_patterns_accept_what_they_should(seed):
    pattern = random_pattern(random.Random(seed))
    grammar = compiled({"type": "string", "pattern": f"^{pattern}$"})
    assert [t for t in TEXTS if accepts(grammar, t)] == [t for t in TEXTS if re.fullmatch(pattern, t)], pattern


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [("(ab+)?", "(ab+|)"), ("(a)??", "(a|)"), (r"\)?", r"\)?"), ("[)?]", "[)?]"), (r"[\])?](a)?", r"[\])?](a|)")],
)
def test_only_optional_groups_are_written_otherwise(pattern, exact):
    assert exact_pattern(pattern) == exact


def test_times():
    grammar = compiled({"type": "string", "format": "time"})
    good = ["00:00:00Z", "23:59:59.5+01:00", "12:00:00.123456789-23:59"]
    bad = ["24:00:00Z", "12:00:60Z", "12:00:00", "12:00:0011Z", "12:00:00.Z", "12:00:00.1234567890Z"]
    assert [text for text in good + bad if accepts(grammar, text)] == good
    assert all(re.fullmatch(FORMATS["time"], text) for text in good)


def test_names_of_pattern_properties():
    grammar = compiled({"type": "object", "patternProperties": {"^x(ab+)?$": {"type": "integer"}}})
    matcher = xgrammar.GrammarMatcher(grammar)
    assert not matcher.accept_string('{"xb"')
