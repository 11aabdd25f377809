"""`dsv4serve chat`: talk to a model in the terminal, or line by line through pipes."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from dsv4serve.cli.conversation import Conversation, ServerError, connect, served_model
from dsv4serve.cli.flags import add_engine_flags, engine_config
from dsv4serve.config import EngineConfig
from dsv4serve.engine.private import private_server
from dsv4serve.types import ConfigError

DESCRIPTION = """\
Chat with a running server (--url), or with a private one that is started for this and stopped at the end.

With --url, --model is a name that the server lists (default: its first), --api-key its key, and no other engine
setting is allowed; without, engine settings are those of the private server, which has its own address and key.

Answers go to standard output, reasoning and statistics to standard error. When standard input is not a terminal,
every line of it is one turn, and the first error ends the chat with exit code 2.

After each answer: tokens, tokens/s (without the time to the first), TTFT (ms from sending to the first output),
how much of the prompt came from the prefix cache, accepted drafts where the server counts them.

"""

HELP = """\
/new            start over; the system prompt stays
/system TEXT    set the system prompt; without TEXT remove it
/think on|off   whether the model thinks first
/help           this list
/exit           end, as Ctrl-D does
Ctrl-C stops an answer. After a tool call, the next line is the tool's result."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="chat in the terminal",
        description=DESCRIPTION + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--url", default="", help="running server, with or without /v1 (default: a private server)")
    add("--max-tokens", type=int, metavar="N", help="tokens of one answer (default: what the context has left)")
    add("--temperature", type=float, metavar="X", help="0 = greedy (default: the checkpoint's)")
    add("--tools", type=Path, metavar="FILE", help="JSON list of function tools in OpenAI's form (default: none)")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Raises ConfigError and ServerError."""
    config = engine_config(args)
    tools = _read_tools(args.tools) if args.tools else []
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    options = {name: value for name, value in options.items() if value is not None}
    with _client(args, config) as client:
        model = served_model(client, str(getattr(args, "model", "")) if args.url else "")
        return Terminal(Conversation(client, model, tools, options)).run()


@contextmanager
def _client(args: argparse.Namespace, config: EngineConfig) -> Iterator[httpx.Client]:
    given = {name for name in EngineConfig.model_fields if hasattr(args, name)}
    given |= {"recipe"} if args.recipe else set()
    wrong = given - {"model", "api_key"} if args.url else given & {"host", "port", "api_key"}
    if wrong:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(wrong))
        owner = "the server at --url has its own" if args.url else "a private server chooses its own"
        raise ConfigError(f"{names}: {owner}")
    if args.url:
        with connect(args.url, next(iter(config.api_key), "")) as client:
            yield client
        return
    if "log_level" not in config.model_fields_set:
        config = config.model_copy(update={"log_level": "warning"})
    print("starting a private server", file=sys.stderr, flush=True)
    with private_server(config) as server, connect(server.url, server.api_key) as client:
        yield client


def _read_tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--tools {path}: {error}") from None
    if not isinstance(tools, list):
        raise ConfigError(f"--tools {path}: expected a JSON list of tools")
    return tools


class Terminal:
    """Reads turns and commands, shows answers."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._interactive = sys.stdin.isatty()
        self._out = Console(highlight=False, soft_wrap=True)
        self._aside = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(self) -> int:
        """Until the input ends or /exit; returns the exit code."""
        if self._interactive:
            import readline  # noqa: F401  line editing and history for input()

            self._note("/help lists the commands, Ctrl-D ends")
        while True:
            try:
                line = self._read()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("\nCtrl-D or /exit ends")
                continue
            try:
                if line.startswith("/"):
                    if line.split()[0] == "/exit":
                        return 0
                    self._command(line)
                elif line.strip() and self._conversation.say(line):
                    self._answer()
            except (ServerError, ConfigError) as error:
                if not self._interactive:
                    raise
                self._aside.print(Text(str(error), "red"))

    def _read(self) -> str:
        awaited = self._conversation.awaited
        if self._interactive:
            return input(f"{printable(awaited.name)} returned> " if awaited else "> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest, conversation = rest.strip(), self._conversation
        if name == "/new":
            conversation.clear()
        elif name == "/system":
            conversation.system = rest
        elif name == "/think" and rest in ("on", "off"):
            conversation.thinking = rest == "on"
        elif name == "/help":
            self._note(HELP)
        else:
            raise ConfigError(f"{line!r} is no command; /help lists them")

    def _answer(self) -> None:
        """Stream one answer and show what it cost. Ctrl-C in an interactive chat ends the answer, not the chat."""
        try:
            with self._conversation.answer() as (answer, pieces):
                try:
                    self._show(pieces)
                except KeyboardInterrupt:
                    if not self._interactive:
                        raise
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._note("\nstopped")
            return
        if answer.content:
            self._out.print()
        for call in answer.calls.values():
            self._out.print(Text(printable(f"{call.name} {call.arguments}").replace("\n", " "), "cyan"))
        self._note(answer.summary())

    def _show(self, pieces: Iterator[tuple[str, str]]) -> None:
        in_reasoning = False
        for reasoning, content in pieces:
            if reasoning:
                self._aside.print(Text(printable(reasoning), "dim italic"), end="")
                in_reasoning = True
            if content:
                if in_reasoning:
                    self._aside.print("\n")
                in_reasoning = False
                self._out.print(Text(printable(content)), end="")
        if in_reasoning:
            self._aside.print()

    def _note(self, text: str) -> None:
        self._aside.print(Text(text, "dim"))


def printable(text: str) -> str:
    """Without control characters other than line breaks and tabs: a model's text must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
