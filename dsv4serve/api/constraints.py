"""What a body says of the form of its output -> a constraint: one structural tag, whatever it was asked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from dsv4serve.api.chat_prompt import ChatPrompt
from dsv4serve.api.schemas import ChatBody, Sampling
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.chat.tools import Tool, check_schema
from dsv4serve.constrained.schemas import check_enforceable, with_exact_strings
from dsv4serve.types import Constraint, InvalidRequest

Format = dict[str, Any]
MAX_CHARS = 65536  # of all that is said of the form
MAX_CHOICES = 1000
MAX_WHITESPACE = 32  # characters in a row between the parts of JSON; without a limit a model can write them for ever
REASONING = (OutputStart.REASONING, OutputStart.REASONING_CONTINUATION)
DSML = ControlToken.DSML.value
KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


def body_constraint(body: Sampling) -> Constraint | None:
    """The constraint of a raw completion, from its first token on. Raises InvalidRequest."""
    return _constraint(body, _asked(body), None)


def chat_constraint(body: ChatBody, prompt: ChatPrompt, tokenizer: ChatTokenizer) -> Constraint | None:
    """The constraint of a chat answer, behind its reasoning. Raises InvalidRequest."""
    asked = _asked(body)
    if prompt.tools is not None:
        asked = _with_calls(body, prompt.tools, prompt.start, asked)
    after = tokenizer.control_ids[ControlToken.END_THINK] if prompt.start in REASONING else None
    return _constraint(body, asked, after)


def client_grammars(body: Sampling) -> list[str]:
    """Fields with parts of the constraint that the client wrote, so that compiling them may fail."""
    fields = [name for name, form in _asked_in(body).items() if form != _json_object(True, "")]
    if isinstance(body, ChatBody) and (_strict_names(body) or _requires_call(body)):
        fields.append("tools")
    return fields


def _constraint(body: Sampling, form: Format | None, after_id: int | None) -> Constraint | None:
    if form is None:
        return None
    for name, value in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens)):
        if value:
            raise InvalidRequest("an output that must match a grammar ends with it; leave this field out", name)
    text = _dumps({"type": "structural_tag", "format": form}, "tools").decode()
    return Constraint(text, after_id)


# What was asked for beside tools


def _asked(body: Sampling) -> Format | None:
    return next(iter(_asked_in(body).values()), None)


def _asked_in(body: Sampling) -> dict[str, Format]:
    """The format by the field that asks for it, of which there is at most one."""
    formats: dict[str, Format] = {}
    response_format = body.response_format if isinstance(body, ChatBody) else None
    if response_format is not None and response_format.get("type") != "text":
        formats["response_format"] = _response_format(response_format)
    for name in ("regex", "ebnf", "structural_tag"):
        value = getattr(body, name)
        if value is not None:
            formats[name] = _FORMATS["grammar" if name == "ebnf" else name](value, name)
    if body.structured_outputs is not None:
        formats["structured_outputs"] = _structured_outputs(body.structured_outputs)
    if len(formats) > 1:
        raise InvalidRequest(f"{' and '.join(formats)} cannot be combined; give one of them", list(formats)[1])
    return formats


def _response_format(raw: dict[str, Any]) -> Format:
    if raw["type"] == "structural_tag":
        return _structural_tag(raw, "response_format")
    if raw["type"] == "json_object":
        return _json({"type": "object"}, "response_format")
    return _json(raw["json_schema"]["schema"], "response_format.json_schema.schema")  # its shape was checked before


def _structured_outputs(raw: Any) -> Format:
    where = "structured_outputs"
    given = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else {}
    if len(given) != 1 or not set(given) <= set(KINDS):
        raise InvalidRequest(f"expected an object with one of {', '.join(KINDS)}", where)
    ((kind, value),) = given.items()
    return _FORMATS[kind](value, f"{where}.{kind}")


def _json(schema: Any, where: str) -> Format:
    if isinstance(schema, str):
        schema = _parsed(schema, where)
    _check_size(_dumps(schema, where), where)
    return {"type": "json_schema", "json_schema": _schema(schema, where), "max_whitespace_cnt": MAX_WHITESPACE}


def _schema(schema: Any, where: str) -> Any:
    check_schema(schema, where)
    check_enforceable(schema, where)
    return with_exact_strings(schema)


def _json_object(value: Any, where: str) -> Format:
    if value is not True:
        raise InvalidRequest("expected true", where)
    return _json({"type": "object"}, where)


def _regex(value: Any, where: str) -> Format:
    return {"type": "regex", "pattern": _text(value, where)}


def _grammar(value: Any, where: str) -> Format:
    return {"type": "grammar", "grammar": _text(value, where)}


def _choice(value: Any, where: str) -> Format:
    if not (isinstance(value, list) and 0 < len(value) <= MAX_CHOICES and all(isinstance(v, str) and v for v in value)):
        raise InvalidRequest(f"expected a list of 1 to {MAX_CHOICES} strings, none of them empty", where)
    _check_size("".join(value).encode(), where)
    return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in value]}


def _structural_tag(value: Any, where: str) -> Format:
    tag = _parsed(value, where) if isinstance(value, str) else value
    if isinstance(tag, dict) and isinstance(tag.get("structures"), list):
        tag = {"format": _triggered(tag, where)}
    if not isinstance(tag, dict) or not isinstance(tag.get("format"), dict):
        raise InvalidRequest("expected an object (or its JSON) of type structural_tag with a format", where)
    _check_size(_dumps(tag, where), where)
    form: Format = _with_checked_schemas(tag["format"], f"{where}.format")
    return form


def _triggered(tag: dict[str, Any], where: str) -> Format:
    """The older form of structural tags, {"structures": [{"begin", "schema", "end"}], "triggers": [..]}."""
    tags = []
    for index, item in enumerate(tag["structures"]):
        if not isinstance(item, dict) or not {"begin", "schema", "end"} <= item.keys():
            raise InvalidRequest("expected an object with begin, schema and end", f"{where}.structures.{index}")
        content = {"type": "json_schema", "json_schema": item["schema"]}
        tags.append({"type": "tag", "begin": item["begin"], "content": content, "end": item["end"]})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _with_checked_schemas(form: Any, where: str) -> Any:
    """A format whose JSON schemas, wherever they stand in it, can be enforced and mean to xgrammar what they say."""
    if isinstance(form, list):
        return [_with_checked_schemas(part, f"{where}.{index}") for index, part in enumerate(form)]
    if not isinstance(form, dict):
        return form
    return {
        key: (_schema if key == "json_schema" else _with_checked_schemas)(part, f"{where}.{key}")
        for key, part in form.items()
    }


_FORMATS = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _dumps(value: Any, where: str) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # orjson's way to say that it is nested too deeply
        raise InvalidRequest("nested too deeply", where) from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("expected a string that is not empty", where)
    _check_size(value.encode("utf-8", "replace"), where)
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"not valid JSON: {error}", where) from None


def _check_size(text: bytes, where: str) -> None:
    if len(text) > MAX_CHARS:
        raise InvalidRequest(f"{len(text)} bytes; at most {MAX_CHARS} are allowed", where)


# Calls


def _with_calls(body: ChatBody, tools: Sequence[Tool], start: OutputStart, asked: Format | None) -> Format:
    """Free text (or what was asked for) or calls; a required call leaves only calls."""
    strict = _strict_names(body)
    choice = body.tool_choice
    if _requires_call(body):
        if asked is not None:
            raise InvalidRequest("a required call and a form of the answer exclude each other", "tool_choice")
        if isinstance(choice, dict):
            tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
        with_schema = {tool["name"] for tool in tools} - _loose_names(body)
        block = _calls(tools, with_schema, strict, body.parallel_tool_calls is not False)
        if start is OutputStart.TOOL_CALLS:
            return {"type": "sequence", "elements": [block["content"], _constant(block["end"])]}
        return {"type": "sequence", "elements": [_constant("\n\n"), block]}
    block = _calls(tools, strict, strict, body.parallel_tool_calls is not False)
    if asked is not None:
        return {"type": "or", "elements": [asked, {"type": "sequence", "elements": [_constant("\n\n"), block]}]}
    return {"type": "triggered_tags", "triggers": [f"<{DSML}"], "tags": [block], "stop_after_first": True}


def _calls(tools: Sequence[Tool], with_schema: set[str], strict: set[str], parallel: bool) -> Format:
    """A block of calls of `tools`. The arguments of those `with_schema` follow their schemas, as far as a grammar can
    say them, which for `strict` ones it must; others have any arguments."""
    tags = []
    for tool in tools:
        schema = tool.get("parameters") if tool["name"] in with_schema else None
        if tool["name"] in strict:
            check_enforceable(schema or True, f"tools.{tool['name']}.parameters")
        arguments = {
            "type": "json_schema",
            "json_schema": with_exact_strings(schema or True),
            "style": "deepseek_xml",
            "max_whitespace_cnt": MAX_WHITESPACE,
        }
        begin, end = f'<{DSML}invoke name="{tool["name"]}">\n', f"</{DSML}invoke>\n"
        tags.append({"type": "tag", "begin": begin, "content": arguments, "end": end})
    invokes = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "",
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    return {"type": "tag", "begin": f"<{DSML}tool_calls>\n", "content": invokes, "end": f"</{DSML}tool_calls>"}


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _requires_call(body: ChatBody) -> bool:
    return body.tool_choice not in (None, "none", "auto")


def _strict_names(body: ChatBody) -> set[str]:
    """Functions whose arguments must follow their schema whenever they are called."""
    return {tool["function"]["name"] for tool in body.tools or () if _strictness(tool) is True}


def _loose_names(body: ChatBody) -> set[str]:
    return {tool["function"]["name"] for tool in body.tools or () if _strictness(tool) is False}


def _strictness(tool: Any) -> bool | None:
    strict = tool["function"].get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest("expected true or false", "tools.function.strict")
    return strict
