"""`dsv4serve render`: chat requests in, the prompts that the server makes of them out. Needs only tokenizer.json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4serve.api.body import parse_body
from dsv4serve.api.chat_prompt import build_prompt
from dsv4serve.api.schemas import ChatBody
from dsv4serve.chat.effort import resolve_contract
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.json_lines import convert_lines
from dsv4serve.config import EffortContract, default_model
from dsv4serve.types import InvalidRequest

CONTRACTS = [contract.value for contract in EffortContract]


class RenderBody(ChatBody):
    """A chat request that may name the effort contract to render it for."""

    contract: str | None = None


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "render",
        help="show the prompts of chat requests",
        description="Read chat requests from stdin, one JSON object a line as POST /v1/chat/completions takes it "
        '(optionally with "contract": "preview" or "0731"), and print one line of JSON each: prompt, token_ids.',
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        default=default_model(),
        help="folder with tokenizer.json (default: the embedded demo)",
    )
    parser.add_argument(
        "--effort-contract",
        choices=CONTRACTS,
        default=EffortContract.AUTO.value,
        help="texts of reasoning_effort, where a request names no contract (default: auto)",
    )
    parser.add_argument(
        "--developer-role",
        choices=["system", "user"],
        default="system",
        help="what developer messages are (default: system)",
    )
    parser.add_argument(
        "--default-thinking",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the model thinks where a request does not say (default: yes)",
    )


def run(args: argparse.Namespace) -> int:
    """Render every request; 1 if any of them is wrong."""
    tokenizer = ChatTokenizer(args.model)
    default = resolve_contract(EffortContract(args.effort_contract), args.model)

    def convert(line: bytes) -> dict[str, Any]:
        body = parse_body(line, RenderBody)
        contract = default if body.contract is None else _contract(body.contract)
        prompt = build_prompt(body.messages, body, contract, args.developer_role, args.default_thinking)
        result = {"prompt": prompt.text, "token_ids": tokenizer.encode_segments(prompt.segments)}
        return result | ({"ignored_fields": unknown} if (unknown := body.unknown_fields()) else {})

    return convert_lines(convert)


def _contract(name: str) -> EffortContract:
    allowed = [contract for contract in EffortContract if contract is not EffortContract.AUTO]
    if name not in allowed:
        raise InvalidRequest(f"contract is {name!r}; allowed are {', '.join(allowed)}", "contract")
    return EffortContract(name)
