"""`dsv4serve parse`: raw completions in, the messages that the server would make of them out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from dsv4serve.api.body import parse_body
from dsv4serve.api.strict import Strict
from dsv4serve.chat.detokenizer import Detokenizer, StopMatcher
from dsv4serve.chat.grammar import Grammar
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.chat.tools import Tool, parse_tools
from dsv4serve.cli.json_lines import convert_lines
from dsv4serve.config import default_model
from dsv4serve.types import InvalidRequest


class ParseBody(Strict):
    """One completion, as text in which control tokens are spelled or as ids."""

    model_config = ConfigDict(extra="forbid")

    completion: str | None = None
    completion_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    start: str = OutputStart.CONTENT.value
    tools_active: bool = True
    tools: Any = None  # schemas help to repair calls; they may be left out
    engine_finish: Literal["stop", "length"] = "stop"


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "parse",
        help="show the messages of raw completions",
        description="Read completions from stdin, one JSON object a line: completion (text) or completion_token_ids, "
        "start (where the prompt left the model: " + ", ".join(OutputStart) + "; default content), tools_active "
        "(default true), tools, engine_finish (stop or length). Prints one line of JSON each: the message, its "
        "finish_reason, and how often the completion left the grammar, by kind.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        default=default_model(),
        help="folder with tokenizer.json (default: the embedded demo)",
    )
    parser.add_argument(
        "--stream",
        choices=["whole", "token", "char"],
        default="whole",
        help="how the parser gets a completion; the message does not depend on it (default: whole)",
    )


def run(args: argparse.Namespace) -> int:
    """Parse every completion; 1 if any line is wrong."""
    tokenizer = ChatTokenizer(args.model)
    return convert_lines(lambda line: _parse(tokenizer, parse_body(line, ParseBody), args.stream))


def _parse(tokenizer: ChatTokenizer, body: ParseBody, stream: str) -> dict[str, Any]:
    if (body.completion is None) == (body.completion_token_ids is None):
        raise InvalidRequest("give either completion or completion_token_ids", "completion")
    if body.start not in list(OutputStart):
        raise InvalidRequest(f"start is {body.start!r}; allowed are {', '.join(OutputStart)}", "start")
    start = OutputStart(body.start)
    ids = tokenizer.encode(body.completion or "") if body.completion_token_ids is None else body.completion_token_ids
    tools = parse_tools(body.tools) if body.tools_active else None
    is_cut = body.engine_finish == "length"
    reply = Reply()
    if stream == "char":
        malformed = _by_characters(tokenizer, ids, start, tools, is_cut, reply)
    else:
        parser = OutputParser(tokenizer, start=start, tools=tools)
        for group in [ids] if stream == "whole" else [[token_id] for token_id in ids]:
            reply.add(parser.feed(group))
        reply.add(parser.finish(is_cut))
        malformed = dict(parser.malformed)
    # Without ids, which are random, so that two runs can be compared.
    calls = [{"type": "function", "function": call["function"]} for call in reply.tool_calls]
    message = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning, "tool_calls": calls}
    finish_reason = "tool_calls" if calls and not is_cut else body.engine_finish
    return {"message": message, "finish_reason": finish_reason, "malformed": malformed}


def _by_characters(
    tokenizer: ChatTokenizer, ids: list[int], start: OutputStart, tools: list[Tool] | None, is_cut: bool, reply: Reply
) -> dict[str, int]:
    grammar = Grammar(start, tools, StopMatcher([]))
    for piece in _pieces(tokenizer, ids):
        if isinstance(piece, ControlToken):
            grammar.marker(piece)
        else:
            for character in piece:
                grammar.text(character)
    grammar.finish(is_cut)
    reply.add(grammar.delta)
    return dict(grammar.malformed)


def _pieces(tokenizer: ChatTokenizer, ids: list[int]) -> Iterator[str | ControlToken]:
    """Texts and markers in order."""
    markers = {tokenizer.control_ids[token]: token for token in (ControlToken.END_THINK, ControlToken.DSML)}
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        if token_id in markers:
            yield detokenizer.flush()
            yield markers[token_id]
        else:
            yield detokenizer.feed(token_id)
    yield detokenizer.flush()
