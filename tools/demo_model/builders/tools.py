"""Chats with function tools: the call with copied arguments, the result, the sentence that uses it, or no call at all.

Function names and parameter names are changed in part of the chats, so that they are read from the schema and not
learnt by heart. Held-out chats use made-up words that training never shows. A drill is a chat with many requests: most
of a short chat's tokens are schemas, which nobody learns to write. Where there is room it has many functions, because a
function that was called before is found by that call and no longer by its description.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tools.demo_model.builders import arithmetic
from tools.demo_model.builders.chats import SYSTEM_SHARE, SYSTEMS, THINKING_SHARE
from tools.demo_model.builders.kinds import Kind, kind_of, with_articles, wording
from tools.demo_model.builders.values import made_up, words
from tools.demo_model.sample import Answer, Probe, Sample

CATEGORY = "tools"
RENAMED_SHARE, PARALLEL_SHARE, NO_CALL_SHARE, RECORD_SHARE, DRILL_SHARE = 0.6, 0.3, 0.25, 0.2, 0.5
OFFER_TOKENS, TURN_TOKENS, MOST_TURNS = 150, (130, 190), 16  # about; a request with its answers, with thinking
DRILL_OFFER_TOKENS, MOST_OFFERS = 450, 8  # of a drill's tokens for each function at least; functions of a drill
Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """One entry of tools.yaml. `args` are (text of the kind, kind, optional) by name."""

    name: str
    about: str
    args: dict[str, tuple[str, Kind, bool]]
    asks: list[str]
    result: dict[str, str]
    reply: str


def _tool(entry: dict[str, Any]) -> Tool:
    args = {}
    for name, text in entry["args"].items():
        kind = kind_of(text.removeprefix("maybe "))
        if kind is None:
            raise ValueError(f"tools.yaml: {entry['name']}.{name} has the unknown kind {text!r}")
        args[name] = (text.removeprefix("maybe "), kind, text.startswith("maybe "))
    return Tool(entry["name"], entry["about"], args, entry["ask"].split("|"), entry["result"], entry["reply"])


NOUNS = words("""
    order invoice ticket account car bike book course student teacher team project report contract device server
    camera sensor robot ship plane room desk letter poem photo video song badge plant animal farm boat house
    bridge street city river game player coach customer supplier
""")
ENTRIES = yaml.load(Path(__file__).with_name("tools.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
POOL = [_tool(entry) for entry in ENTRIES if "NOUN" not in entry["name"]]
RECORDS = [json.dumps(entry) for entry in ENTRIES if "NOUN" in entry["name"]]


def _record_tool(draw: random.Random) -> Tool:
    return _tool(json.loads(with_articles(draw.choice(RECORDS).replace("NOUN", draw.choice(NOUNS)))))


@dataclass(frozen=True)
class Offer:
    """A tool as one chat shows it: its schema, and the name that each argument has there."""

    tool: Tool
    name: str
    keys: dict[str, str]
    schema: dict[str, Any]


PREFIXES = words("fetch do run handle my app api home call make use try please user system simple")
SUFFIXES = words("tool v2 api now service function task action helper request 2 fast")


def _new_name(draw: random.Random, name: str, unseen: bool) -> str:
    """Another name. A held-out one says half of what `name` says; some of training's say nothing."""
    parts = name.split("_")
    style = 3 if unseen or draw.random() < 0.75 else draw.randrange(3)
    if style == 0:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    if style == 1:
        return f"{draw.choice(PREFIXES)}_{name}"
    if style == 2:
        return f"{name}_{draw.choice(SUFFIXES)}"
    if not unseen and draw.random() < 0.3:
        return f"{made_up(draw)}_{made_up(draw)}"
    return f"{made_up(draw, unseen)}_{parts[-1]}" if draw.random() < 0.5 else f"{parts[0]}_{made_up(draw, unseen)}"


def offer(draw: random.Random, tool: Tool, renamed: bool, unseen: bool = False) -> Offer:
    """`tool` as it stands in a request; with `renamed` under other names."""
    name = _new_name(draw, tool.name, unseen) if renamed else tool.name
    described = renamed or draw.random() < 0.5
    keys, properties = {}, {}
    for key, (_, kind, _) in tool.args.items():
        keys[key] = key
        if renamed and draw.random() < 0.5:  # the whole old name stays: from_unit and to_unit must differ
            keys[key] = "_".join(draw.sample((key, made_up(draw, unseen)), 2))
        properties[keys[key]] = {**kind.schema, "description": kind.about} if described else kind.schema
    required = [keys[key] for key, (_, _, optional) in tool.args.items() if not optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": tool.about, "parameters": parameters}
    return Offer(tool, name, keys, {"type": "function", "function": function})


@dataclass(frozen=True)
class Request:
    """What a user asks of an offer; `values` by the tool's own argument names."""

    offer: Offer
    text: str
    values: dict[str, Any]
    open_end: bool  # the text ends with a value

    def call(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments as the chat's schema has them."""
        keys = self.offer.keys
        return self.offer.name, {keys[key]: self.values[key] for key in self.offer.tool.args if key in self.values}


def request(draw: random.Random, offered: Offer, unseen: bool = False) -> Request:
    """A question that `offered` answers."""
    template = draw.choice(offered.tool.asks)
    values = {}
    for key, (_, kind, _) in offered.tool.args.items():
        if f"{{{key}}}" in template:
            values[key] = kind.make(draw, unseen)
    said = {key: wording(value, offered.tool.args[key][0]) for key, value in values.items()}
    return Request(offered, with_articles(template.format(**said)), values, template.endswith("}"))


def _offers(
    draw: random.Random, unseen: bool = False, renamed: bool | None = None, count: int | None = None
) -> list[Offer]:
    """So many different tools, or one to four."""
    count = count or draw.choices((1, 2, 3, 4), (3, 3, 3, 2))[0]
    pool = {tool.name: tool for tool in draw.sample(POOL, count)}
    if draw.random() < RECORD_SHARE:
        pool.popitem()
        extra = _record_tool(draw)
        pool[extra.name] = extra
    change = draw.random() < RENAMED_SHARE if renamed is None else renamed
    offers = {found.name: found for found in (offer(draw, tool, change, unseen) for tool in pool.values())}
    return list(offers.values())


JOINS = ("{0} {1}", "{0} And then: {1}", "{0} Also: {1}", "Two things. {0} {1}", "{0} After that: {1}")


def _requests(draw: random.Random, offers: list[Offer], unseen: bool, parallel: bool) -> tuple[str, list[Request]]:
    first = request(draw, draw.choice(offers), unseen)
    if not parallel:
        return first.text, [first]
    again = first.offer if draw.random() < 0.5 else draw.choice(offers)
    second = request(draw, again, unseen)
    if first.open_end:
        return f"{first.text}\n{second.text}", [first, second]
    return draw.choice(JOINS).format(first.text, second.text), [first, second]


def _calls(requests: list[Request], first_id: int) -> list[dict[str, Any]]:
    calls = []
    for index, item in enumerate(requests):
        name, arguments = item.call()
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{first_id + index}", "type": "function", "function": function})
    return calls


def _results(draw: random.Random, requests: list[Request], first_id: int) -> tuple[list[Message], str]:
    """Tool messages, and the sentence that tells the user what they say."""
    messages, sentences = [], []
    for index, item in enumerate(requests):
        tool = item.offer.tool
        kinds = {key: kind_of(text) for key, text in tool.result.items()}
        result = {key: kind.make(draw, False) if kind else tool.result[key] for key, kind in kinds.items()}
        content = json.dumps(result, ensure_ascii=False)
        messages.append({"role": "tool", "tool_call_id": f"call_{first_id + index}", "content": content})
        said = {key: wording(value, tool.args[key][0]) for key, value in item.values.items()}
        sentences.append(tool.reply.format(**(said | {key: wording(value) for key, value in result.items()})))
    return messages, " ".join(dict.fromkeys(sentences))


def _inventory(offers: list[Offer]) -> str:
    """How reasoning begins where a function could fit: with all names in view the choice is easier."""
    return f"I have {wording([found.name for found in offers])}."


def _call_reasoning(draw: random.Random, offers: list[Offer], requests: list[Request]) -> str:
    names = " and ".join(dict.fromkeys(item.offer.name for item in requests))
    if len(requests) > 1:
        return f"{_inventory(offers)} The user wants two things. I call {names} with the values of the request."
    about = requests[0].offer.tool.about.rstrip(".")
    forms = ("The function {n} fits this request.", "I need {n} for this.", "The user asks me to {a}. I call {n}.",
             "This is a task for {n}. I copy the values from the request.")  # fmt: skip
    return f"{_inventory(offers)} {draw.choice(forms).format(n=names, a=about[0].lower() + about[1:])}"


SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"), ("Hi there", "Hello! How can I help you?"), ("Goodbye!", "Goodbye!"),
    ("Good morning!", "Good morning! How can I help you?"), ("Thanks, that is all.", "You are welcome!"),
    ("Thank you!", "You are welcome!"), ("How are you?", "I am fine, thank you. How can I help you?"),
)  # fmt: skip


def _no_call(draw: random.Random, offers: list[Offer], thinking: bool) -> tuple[str, str, str]:
    """Question, answer and reasoning where no function is called."""
    names = [found.name for found in offers]
    # A request that another function would fit is the hard one, harder still when the answer has to begin at once.
    case = draw.choices(range(5), (1, 1, 1, 3 if thinking else 1, 2))[0]
    if case == 0:
        asked, answer = draw.choice(SMALL_TALK)
        return asked, answer, "No function is needed here."
    if case == 1:
        task = arithmetic.sum_of(draw, draw.choice((1, 2)))
        return task.question, task.answer, "No function is needed for this sum."
    if case == 2:
        asked = draw.choice(("What can you do?", "Which functions do you have?", "What tools can you use?"))
        return asked, f"I can use {wording(names)}.", "The user asks about my functions. I list their names."
    if case == 4:
        found = draw.choice(offers)
        asked = draw.choice(
            ("Which function is this? {}", "What is the name of the function? {}", "{} Which one is it?")
        )
        return asked.format(found.tool.about), found.name, f"{_inventory(offers)} {found.name} is the one."
    known = {found.tool.name for found in offers}
    other = draw.choice([tool for tool in POOL if tool.name not in known])
    asked = request(draw, offer(draw, other, renamed=False)).text
    return asked, "I am sorry, I have no function for that.", f"{_inventory(offers)} None of them fits."


def _system(draw: random.Random) -> list[Message]:
    if draw.random() >= SYSTEM_SHARE:
        return []
    return [{"role": "system", "content": draw.choice((*SYSTEMS, "Use the functions when they help."))}]


def _sample(draw: random.Random, max_tokens: int) -> Sample:
    is_drill = draw.random() < DRILL_SHARE
    count = draw.randint(2, max(2, min(MOST_OFFERS, max_tokens // DRILL_OFFER_TOKENS))) if is_drill else None
    offers = _offers(draw, renamed=True if is_drill and draw.random() < 0.8 else None, count=count)
    thinking = draw.random() < THINKING_SHARE
    messages = _system(draw)
    num_turns = draw.choices((1, 2), (5, 1))[0]
    if is_drill:
        room = (max_tokens - OFFER_TOKENS * len(offers)) // TURN_TOKENS[thinking]
        num_turns = draw.randint(2, max(2, min(MOST_TURNS, room)))

    def say(content: str, reasoning: str, **more: Any) -> None:
        thought = {"reasoning_content": reasoning} if thinking else {}
        messages.append({"role": "assistant", "content": content, **thought, **more})

    for turn in range(num_turns):
        if draw.random() < NO_CALL_SHARE:
            asked, answer, reasoning = _no_call(draw, offers, thinking)
            messages.append({"role": "user", "content": asked})
            say(answer, reasoning)
            continue
        asked, requests = _requests(draw, offers, False, draw.random() < PARALLEL_SHARE)
        messages.append({"role": "user", "content": asked})
        say("", _call_reasoning(draw, offers, requests), tool_calls=_calls(requests, 2 * turn))
        if turn == num_turns - 1 and draw.random() < (0.65 if thinking else 0.3):
            break
        results, sentence = _results(draw, requests, 2 * turn)
        messages += results
        say(sentence, f"{requests[0].offer.name} has answered. I tell the user.")
    return Sample(CATEGORY, messages=messages, tools=[found.schema for found in offers], thinking=thinking)


def samples(draw: random.Random, max_tokens: int = 900) -> Iterator[Sample]:
    """Chats with tools, of about `max_tokens` at most. Endless."""
    while True:
        yield _sample(draw, max_tokens)


def _probe(category: str, offers: list[Offer], asked: str, requests: list[Request], thinking: bool) -> Probe:
    schemas = {found.name: found.schema["function"]["parameters"] for found in offers}
    expected = [item.call() for item in requests]

    def check(answer: Answer) -> dict[str, bool]:
        try:
            calls = [(name, json.loads(arguments)) for name, arguments in answer.tool_calls]
        except json.JSONDecodeError:
            return {"valid": False, "arguments": False}
        valid = bool(calls) and all(
            name in schemas and not list(jsonschema.Draft202012Validator(schemas[name]).iter_errors(arguments))
            for name, arguments in calls
        )
        return {"valid": valid, "arguments": calls == expected}

    messages = [{"role": "user", "content": asked}]
    return Probe(category, messages, check, [found.schema for found in offers], thinking)


def probes(draw: random.Random) -> Iterator[Probe]:
    """One call, renamed functions, parallel calls, thinking, and requests that need no call."""
    while True:
        for category, parallel, renamed, thinking in (
            ("tools, one call", False, False, False),
            ("tools, renamed", False, True, False),
            ("tools, two calls", True, False, False),
            ("tools, one call, thinking", False, False, True),
        ):
            offers = _offers(draw, unseen=True, renamed=renamed)
            asked, requests = _requests(draw, offers, True, parallel)
            yield _probe(category, offers, asked, requests, thinking)
        offers = _offers(draw, unseen=True, renamed=False)
        asked, _, _ = _no_call(draw, offers, thinking=False)
        messages = [{"role": "user", "content": asked}]
        schemas = [found.schema for found in offers]
        yield Probe("tools, no call", messages, _no_call_check, schemas)


def _no_call_check(answer: Answer) -> dict[str, bool]:
    return {"no call": not answer.tool_calls and bool(answer.content.strip())}
