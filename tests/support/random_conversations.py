"""Random requests that dsv4serve and deepseek-recipe 0.2.0 must render alike; what differs on purpose is left out, see
docs/api.md. A plain generator: 2,000 requests take less than a second."""

import json
import random
import sys
from typing import Any

WORDS = (
    *("a", "b\n", "\n\n", "</think>", "<think>", "<\uff5cUser\uff5c>x", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *(
        "\uff5cDSML\uff5c",
        "<tool_result>",
        "日本",
        "größe",
        '"q"',
        " ",
        "\t",
        "The weather in Bonn",
        "x = {1: 2}",
        "1e5",
    ),
    *("\x00", "\U0001f600", "e\u0301", "12345678"),
)
ROLES = ("system", "user", "user", "latest_reminder", "assistant", "assistant", "calls")
SCHEMA = {"type": "object", "properties": {"größe": {"type": "string", "enum": ["a", "ü"]}}, "required": []}


def text(draw: random.Random) -> str:
    """Not empty: words that are easily taken for something else, or any characters."""
    if draw.random() < 0.7:
        return "".join(draw.choices(WORDS, k=draw.randint(1, 3)))
    top = draw.choice([0x7F, 0x24F, sys.maxunicode])
    points = [draw.randint(0, top) for _ in range(draw.randint(1, 6))]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000) or "a"


def maybe(draw: random.Random) -> str:
    """A text, or none."""
    return text(draw) if draw.random() < 0.8 else ""


def value(draw: random.Random, depth: int = 2) -> Any:
    """JSON. Whole numbers fit 53 bits: the recipe reads larger ones as floats."""
    kind = draw.randint(0, 6 if depth else 4)
    if kind == 5:
        return [value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind == 6:
        return {text(draw): value(draw, depth - 1) for _ in range(draw.randint(0, 3))}
    plain = (None, draw.random() < 0.5, draw.randint(-(2**53), 2**53), round(draw.uniform(-1e6, 1e6), 3), text(draw))
    return plain[kind]


def arguments(draw: random.Random) -> str:
    """Of a call: JSON of an object with at least one member, or something else."""
    if draw.random() < 0.2:
        return draw.choice(["not json", "[1]", '"x"', "{"])
    names = draw.sample(["city", "n", "größe", "a b"], draw.randint(1, 3))
    return json.dumps({name: value(draw) for name in names}, ensure_ascii=draw.random() < 0.5)


def messages(draw: random.Random) -> list[dict[str, Any]]:
    """OpenAI-shaped: every call is answered, in any order; the last one may be a prefix."""
    found: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 6)):
        kind = draw.choice(ROLES)
        if kind not in ("assistant", "calls"):
            found.append({"role": kind, "content": maybe(draw) if kind == "system" else text(draw)})
            continue
        message: dict[str, Any] = {"role": "assistant", "content": maybe(draw), "reasoning_content": maybe(draw)}
        found.append(message)
        if kind == "calls":
            ids = [f"c{number}" for number in range(draw.randint(1, 3))]
            message["tool_calls"] = [
                {"id": i, "type": "function", "function": {"name": "f", "arguments": arguments(draw)}} for i in ids
            ]
            found += [{"role": "tool", "tool_call_id": i, "content": maybe(draw)} for i in draw.sample(ids, len(ids))]
    since_user: list[str] = []
    for message in found:
        since_user = [] if message["role"] in ("user", "tool") else [*since_user, message["role"]]
    last = found[-1]
    if last["role"] == "assistant" and since_user.count("assistant") == 1 and draw.random() < 0.5:
        last["prefix"] = True
        last["content"] = last["content"] or ("" if last["reasoning_content"] else "a")
    elif last["role"] != "tool":
        found.append({"role": "user", "content": text(draw)})
        if draw.random() < 0.5:
            found.append({"role": "latest_reminder", "content": text(draw)})
    return found


def tools(draw: random.Random) -> list[dict[str, Any]]:
    """OpenAI's function tools, with all the keys that the recipe writes."""
    names = draw.sample(["f", "get-weather", "x_1"], draw.choice([0, 0, 1, 2]))
    return [
        {"type": "function", "function": {"name": name, "description": maybe(draw), "parameters": SCHEMA}}
        for name in names
    ]
