"""Tool definitions, calls and response formats: checked as they come from a client, written as the model reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for

from dsv4serve.chat.tokenizer import ControlToken, Segment
from dsv4serve.types import InvalidRequest

MAX_TOOLS = 1024
NAME = re.compile(r"[\w.:/-]{1,128}")  # quotes, spaces and angle brackets would break the markup
Tool = dict[str, Any]  # an OpenAI function object: name, and what else the client sent, in its order
NOT_FOR_THE_MODEL = ("strict", "defer_loading")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of an assistant message. `arguments` is JSON text, as the API has it."""

    id: str
    name: str
    arguments: str


DSML = ControlToken.DSML
OPEN_CALLS: tuple[Segment, ...] = ("\n\n<", DSML, "tool_calls>\n")
CLOSE_CALLS: tuple[Segment, ...] = ("\n</", DSML, "tool_calls>")

_TOOLS_HEAD = """\n\n## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{D}tool_calls>" block like the following:

<{D}tool_calls>
<{D}invoke name="$TOOL_NAME">
<{D}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}parameter>
...
</{D}invoke>
<{D}invoke name="$TOOL_NAME2">
...
</{D}invoke>
</{D}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

""".replace("{D}", DSML)
_TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
_CONTROLS = {DSML.value: DSML, "<think>": ControlToken.THINK, "</think>": ControlToken.END_THINK}
# The markup inside the block's own wording is real control tokens.
_HEAD_SEGMENTS: tuple[Segment, ...] = tuple(
    _CONTROLS.get(piece, piece) for piece in re.split(f"({DSML}|</?think>)", _TOOLS_HEAD)
)


def parse_tools(raw: Any, param: str = "tools") -> list[Tool]:
    """Check OpenAI function tools; the result is what the model gets to see of each.

    Raises InvalidRequest whose `param` is the dotted path of what is wrong.
    """
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise InvalidRequest(f"expected a list of function tools, got {kind_of(raw)}", param)
    if len(raw) > MAX_TOOLS:
        raise InvalidRequest(f"{len(raw)} tools; at most {MAX_TOOLS} are allowed", param)
    tools = [_tool(item, f"{param}.{index}") for index, item in enumerate(raw)]
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool["name"] in seen:
            raise InvalidRequest(f"two tools have the name {tool['name']!r}", f"{param}.{index}.function.name")
        seen.add(tool["name"])
    return tools


def parse_calls(raw: Any, param: str) -> tuple[ToolCall, ...]:
    """Check the tool_calls of an assistant message. `name` and `arguments` may also stand without `function` around
    them. Arguments are not checked: a model's mistake must be able to come back in its history."""
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise InvalidRequest(f"expected a list of tool calls, got {kind_of(raw)}", param)
    return tuple(_call(item, f"{param}.{index}") for index, item in enumerate(raw))


def tools_block(tools: Iterable[Tool]) -> list[Segment]:
    """The part of the system text that declares `tools`."""
    return [*_HEAD_SEGMENTS, "\n".join(map(to_json, tools)), _TOOLS_TAIL]


def calls_block(calls: Sequence[ToolCall]) -> list[Segment]:
    """An assistant's calls as the model writes them, from the blank line before to the closing tag."""
    segments: list[Segment] = list(OPEN_CALLS)
    for index, call in enumerate(calls):
        segments += ["\n<" if index else "<", DSML, f'invoke name="{call.name}">\n']
        for place, (name, value) in enumerate(arguments_object(call.arguments).items()):
            is_text = isinstance(value, str)
            segments += ["\n<" if place else "<", DSML, f'parameter name="{name}" string="{str(is_text).lower()}">']
            segments += [value if is_text else to_json(value), "</", DSML, "parameter>"]
        segments += ["\n</", DSML, "invoke>"]  # without arguments this leaves an empty line, as the official encoder
    segments += CLOSE_CALLS
    return segments


def response_format_text(raw: Any, param: str = "response_format") -> str:
    """What a response_format of the API adds to the system text. Raises InvalidRequest for other shapes."""
    kind = "text" if raw is None else raw.get("type") if isinstance(raw, dict) else None
    if kind in ("text", "structural_tag"):
        return ""
    if kind == "json_object":
        return (
            "\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\n"
            "Reply with JSON object ONLY."
        )
    if kind != "json_schema":
        raise InvalidRequest("expected an object whose type is text, json_object, json_schema or structural_tag", param)
    schema = raw["json_schema"].get("schema") if isinstance(raw.get("json_schema"), dict) else None
    check_schema(schema, f"{param}.json_schema.schema")
    return "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n" + to_json(schema)


def to_json(value: Any) -> str:
    """JSON as the model was trained on it: ", " and ": ", characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False)


def arguments_object(text: str) -> Mapping[str, Any]:
    """A call's arguments. What is no JSON object becomes one string, so that the model sees its own mistake."""
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            to_json(value)  # nesting that cannot be written again counts as no JSON
            return value
    except (ValueError, RecursionError):
        pass
    return {"arguments": text}


def _call(raw: Any, where: str) -> ToolCall:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object with id and function, got {kind_of(raw)}", where)
    if raw.get("type", "function") != "function":
        raise InvalidRequest("only calls of type 'function' are supported", f"{where}.type")
    call_id = raw.get("id") or ""
    if not isinstance(call_id, str):
        raise InvalidRequest(f"expected a string, got {kind_of(call_id)}", f"{where}.id")
    function = raw.get("function", raw)
    where = where if function is raw else f"{where}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"expected an object with name and arguments, got {kind_of(function)}", where)
    name = _checked_name(function.get("name"), f"{where}.name")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, dict):
        arguments = to_json(arguments)
    if not isinstance(arguments, str):
        raise InvalidRequest(f"expected JSON in a string, got {kind_of(arguments)}", f"{where}.arguments")
    return ToolCall(call_id, name, arguments)


def _tool(raw: Any, where: str) -> Tool:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object with type and function, got {kind_of(raw)}", where)
    if raw.get("type", "function") != "function":
        raise InvalidRequest("only tools of type 'function' are supported", f"{where}.type")
    function = raw.get("function")
    where = f"{where}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"expected an object with name and parameters, got {kind_of(function)}", where)
    _checked_name(function.get("name"), f"{where}.name")
    if not isinstance(function.get("description") or "", str):
        raise InvalidRequest("expected a string", f"{where}.description")
    if function.get("parameters") is not None:
        check_schema(function["parameters"], f"{where}.parameters")
    tool = {key: value for key, value in function.items() if value is not None and key not in NOT_FOR_THE_MODEL}
    try:
        to_json(tool)
    except RecursionError:
        raise InvalidRequest("the definition is nested too deeply", where) from None
    return tool


def _checked_name(name: Any, where: str) -> str:
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    shown = repr(name[:40]) if isinstance(name, str) else kind_of(name)
    raise InvalidRequest(f"expected a name of 1 to 128 letters, digits and _ . : / -, got {shown}", where)


def check_schema(schema: Any, where: str) -> None:
    """Raise InvalidRequest unless `schema` is a JSON schema."""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"expected a JSON schema (an object), got {kind_of(schema)}", where)
    if not isinstance(schema.get("$schema", ""), str):
        raise InvalidRequest("expected a string", f"{where}.$schema")
    try:
        wrong = _schema_error(json.dumps(schema))
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply", where) from None
    if wrong is not None:
        path, message = wrong
        raise InvalidRequest(f"not a JSON schema: {message}", ".".join([where, *path]))


@lru_cache(maxsize=1024)  # agents send the same tools with every request, and a check takes a millisecond
def _schema_error(text: str) -> tuple[list[str], str] | None:
    schema = json.loads(text)
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return [str(step) for step in error.absolute_path], error.message[:200]
    except ValueError as error:  # of parsing the URL in $schema
        return ["$schema"], str(error)
    return None


def kind_of(value: Any) -> str:
    """What a wrong JSON value is, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
