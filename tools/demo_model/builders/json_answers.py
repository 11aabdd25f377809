"""Chats that ask for a JSON answer: facts in the user's text, keys in the instruction, only JSON in the answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.demo_model.builders.chats import SYSTEM_SHARE, SYSTEMS, THINKING_SHARE, answered
from tools.demo_model.builders.kinds import kind_of, with_articles, wording
from tools.demo_model.sample import Answer, Probe, Sample

CATEGORY = "json_answers"
Message = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One fact of a record: the keys it may be asked by, its kind of value, and sentences about {N} with the value {v}.
    A flag has a sentence for true and one for false."""

    keys: tuple[str, ...]
    kind: str
    sentences: tuple[str, ...]


def _fields(table: str) -> list[Field]:
    rows = [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]
    return [Field(tuple(row[0].split()), row[1], tuple(row[2:])) for row in rows]


RECORDS = {  # by what {N} is, in the plural; the first field is its name
    "people": _fields("""
        name full_name person   | person               | This is about {v}. | The name is {v}.
        age age_years years     | age                  | {N} is {v} years old. | {N} turned {v} this year.
        city home town          | city                 | {N} lives in {v}. | The home of {N} is {v}.
        job profession work     | baker/doctor/teacher/farmer/nurse/pilot | {N} works as a {v}. | {N} is a {v}.
        email mail              | email                | The email of {N} is {v}. | You can write to {v}.
        hobby interest          | chess/football/swimming/reading/cooking | {N} likes {v}. | The hobby is {v}.
        married is_married      | flag yes/no          | {N} is married. | {N} is not married.
        children num_children   | few                  | {N} has {v} children.
        favorite_color color    | color                | The favorite color of {N} is {v}. | {N} loves the color {v}.
        languages speaks        | language*            | {N} speaks {v}.
    """),
    "products": _fields("""
        product name title      | title                | The product is {v}. | We sell {v}.
        price cost              | amount               | {N} costs {v}. | The price is {v}.
        currency                | currency             | The price is given in {v}.
        stock quantity count    | count                | There are {v} pieces left. | We have {v} of them.
        color                   | color                | {N} is {v}. | The color is {v}.
        available in_stock      | flag yes/no          | {N} is available. | {N} is not available.
        code sku article        | code                 | The code is {v}. | {N} has the article code {v}.
        parts contents          | thing*               | The box holds {v}. | {N} comes with {v}.
    """),
    "events": _fields("""
        event title name        | title                | The event is called {v}. | There will be the {v}.
        date day                | date                 | It is on {v}. | The date is {v}.
        time start start_time   | time                 | It begins at {v}. | {N} starts at {v}.
        place city location     | city                 | It takes place in {v}. | {N} is in {v}.
        guests visitors         | count                | There will be {v} guests. | {v} people will come.
        host organizer          | person               | The host is {v}. | {v} organizes it.
        free no_fee             | flag yes/no          | There is no fee. | There is a fee.
        food menu               | food*                | We serve {v}. | There will be {v} to eat.
    """),
    "trips": _fields("""
        flight trip number      | code                 | The flight is {v}. | The trip has the number {v}.
        origin from start       | city                 | It starts in {v}. | {N} leaves from {v}.
        destination to goal     | city                 | It goes to {v}. | {N} flies to {v}.
        date day                | date                 | The date is {v}. | It leaves on {v}.
        departure time          | time                 | It departs at {v}. | Departure is at {v}.
        passengers people       | count                | There are {v} passengers. | {v} people are on board.
        price cost              | amount               | A ticket costs {v}. | The price is {v}.
        direct nonstop          | flag yes/no          | It is a direct flight. | There is a stop on the way.
    """),
    "books": _fields("""
        title book name         | title                | The book is called {v}. | I read {v}.
        author writer           | person               | It was written by {v}. | The author of {N} is {v}.
        pages length            | number               | It has {v} pages. | {N} is {v} pages long.
        language                | language             | It is in {v}. | {N} is written in {v}.
        rating stars            | few                  | It gets {v} of 10 stars. | The rating is {v}.
        topic subject           | topic                | It is about a {v}. | The topic is {v}.
        sold_out is_sold_out    | flag yes/no          | It is sold out. | It is not sold out.
    """),
}  # fmt: skip
ASKS = (
    "Reply in JSON with the keys {k}.", "Answer in JSON with the keys {k}.", "Give me a JSON object with {k}.",
    "Write this as JSON with the keys {k}.", "Extract {k} as JSON.", "Return only JSON with the keys {k}.",
    "Turn this into a JSON object with the keys {k}.", "Respond with JSON. Use the keys {k}.",
)  # fmt: skip
INDENTED = ("Indent it by two spaces.", "Use two spaces of indentation.", "Pretty print it.")


@dataclass(frozen=True)
class Task:
    """Facts in words, how JSON is asked for, and the object that answers it."""

    facts: str
    ask: str
    answer: dict[str, Any]
    indented: bool = False

    def text(self) -> str:
        """The answer as the assistant writes it."""
        return json.dumps(self.answer, ensure_ascii=False, indent=2 if self.indented else None)


def _sentence(draw: random.Random, field: Field, value: Any, name: str) -> str:
    if isinstance(value, bool):
        return field.sentences[not value].format(N=name)
    return with_articles(draw.choice(field.sentences).format(N=name, v=wording(value)))


def _record(draw: random.Random, fields: list[Field], keys: list[str], unseen: bool) -> tuple[str, dict[str, Any]]:
    """Sentences and values by key for `fields`, of which the first is the name."""
    kinds = [kind_of(field.kind) for field in fields]
    values = [kind.make(draw, unseen) for kind in kinds if kind]
    name = str(values[0])
    if draw.random() < 0.2:  # facts as a list
        shown = [f"{field.keys[0]}: {wording(value, field.kind)}" for field, value in zip(fields, values, strict=True)]
        return draw.choice(("\n", ", ")).join(shown), dict(zip(keys, values, strict=True))
    pairs = list(zip(fields, values, strict=True))
    rest = draw.sample(pairs[1:], len(pairs) - 1)
    sentences = [_sentence(draw, field, value, name) for field, value in [pairs[0], *rest]]
    return " ".join(sentences), dict(zip(keys, values, strict=True))


def task(draw: random.Random, unseen: bool = False) -> Task:
    """One object, flat or nested, with missing facts, by a schema, or a list of objects."""
    plural, table = draw.choice(list(RECORDS.items()))
    fields = [table[0], *draw.sample(table[1:], draw.randint(1, 5))]
    keys = [draw.choice(field.keys) for field in fields]
    case, indented = draw.random(), draw.random() < 0.25
    if case < 0.12:
        return _several(draw, plural, fields[:4], keys[:4], unseen)
    facts, values = _record(draw, fields, keys, unseen)
    asked = draw.sample(keys, draw.randint(max(1, len(keys) - 2), len(keys))) if draw.random() < 0.6 else keys
    answer = {key: values[key] for key in asked}
    if case < 0.24 and len(asked) > 2:
        inner = asked[1:]
        outer = draw.choice(("details", "data", "info", "facts"))
        ask = f"Reply in JSON with the keys {asked[0]} and {outer}; put {wording(inner)} into {outer}."
        answer = {asked[0]: values[asked[0]], outer: {key: values[key] for key in inner}}
    elif case < 0.34:
        missing = draw.choice([field for field in table if field not in fields])
        answer[draw.choice(missing.keys)] = None
        ask = f"{_ask(draw, list(answer))} Use null for what is not given."
    elif case < 0.46:
        ask = draw.choice(("Answer with JSON that fits this schema: {}", "Reply with JSON of this schema: {}"))
        ask = ask.format(json.dumps(_schema(fields, keys, asked)))
    else:
        ask = _ask(draw, asked)
    if indented:
        ask += f" {draw.choice(INDENTED)}"
    return Task(facts, ask, answer, indented)


def _ask(draw: random.Random, keys: list[str]) -> str:
    ask = draw.choice(ASKS).format(k=wording(keys) if draw.random() < 0.7 else ", ".join(keys))
    return ask.replace("the keys", "the key") if len(keys) == 1 else ask


def _schema(fields: list[Field], keys: list[str], asked: list[str]) -> dict[str, Any]:
    schemas = {key: kind.schema for key, field in zip(keys, fields, strict=True) if (kind := kind_of(field.kind))}
    return {"type": "object", "properties": {key: schemas[key] for key in asked}, "required": asked}


def _several(draw: random.Random, plural: str, fields: list[Field], keys: list[str], unseen: bool) -> Task:
    records = [_record(draw, fields, keys, unseen) for _ in range(draw.randint(2, 3))]
    ask = f"Reply in JSON with the key {plural}: a list of objects with {wording(keys)}."
    return Task("\n".join(facts for facts, _ in records), ask, {plural: [values for _, values in records]})


def _messages(draw: random.Random, item: Task) -> list[Message]:
    place = draw.random()
    if place < 0.35:
        return [{"role": "system", "content": item.ask}, {"role": "user", "content": item.facts}]
    both = f"{item.ask}\n{item.facts}" if place < 0.5 else f"{item.facts}\n{item.ask}"
    messages = [{"role": "user", "content": both}]
    if draw.random() < SYSTEM_SHARE / 2:
        messages.insert(0, {"role": "system", "content": draw.choice(SYSTEMS)})
    return messages


def _reasoning(item: Task) -> str:
    return f"The answer must be JSON with {wording(list(item.answer))}. I take the values from the text."


def samples(draw: random.Random) -> Iterator[Sample]:
    """Chats with a JSON answer."""
    while True:
        item = task(draw)
        reasoning = _reasoning(item) if draw.random() < THINKING_SHARE else None
        yield answered(_messages(draw, item), CATEGORY, item.text(), reasoning)


def probes(draw: random.Random) -> Iterator[Probe]:
    """The same with words that training never shows; every fourth in thinking mode."""
    index = 0
    while True:
        item = task(draw, unseen=True)
        messages = _messages(draw, item)
        yield _probe(item, messages, thinking=index % 4 == 3)
        index += 1


def _probe(item: Task, messages: list[Message], thinking: bool) -> Probe:
    def check(answer: Answer) -> dict[str, bool]:
        try:
            found = json.loads(answer.content)
        except json.JSONDecodeError:
            found = None
        return {"valid": isinstance(found, dict), "values": found == item.answer}

    return Probe("json answers, thinking" if thinking else "json answers", messages, check, thinking=thinking)
