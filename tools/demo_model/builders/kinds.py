"""Kinds of values that arguments and JSON fields are made of: a JSON schema, a description and a generator each."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.demo_model.builders.values import BOYS, CITIES, GIRLS, LAST_NAMES, WORDS, made_up, words

Make = Callable[[random.Random, bool], Any]  # (draw, unseen): with `unseen` words are made up and held out
MADE_UP_SHARE = 0.45
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
THINGS = tuple(word for word in WORDS["objects"] + WORDS["animals"] if " " not in word)
EVENTS = words("meeting lunch dinner party lesson concert visit interview training match workshop dentist")
TASKS = (
    "buy {}",
    "call {}",
    "clean the {}",
    "paint the {}",
    "feed the {}",
    "fix the {}",
    "visit {}",
    "look for the {}",
)
MESSAGES = (
    "I will be late", "See you at the {}", "The {} is ready", "Please bring the {}", "I found your {}", "I am at home",
    "Thank you for the {}", "Where is the {}?", "The {} and the {} are in the kitchen", "We meet at the {}",
    "Happy birthday, {}!", "I like your {}", "Do not forget the {}", "The {} is broken", "Can you feed the {}?",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`schema` without description; `make` draws a value that fits it."""

    schema: dict[str, Any]
    about: str
    make: Make


def _word(draw: random.Random, unseen: bool, pool: tuple[str, ...] = THINGS) -> str:
    return made_up(draw, unseen) if unseen or draw.random() < MADE_UP_SHARE else draw.choice(pool)


def _city(draw: random.Random, unseen: bool) -> str:
    word = _word(draw, unseen, CITIES)
    return word[0].upper() + word[1:]


def _person(draw: random.Random, unseen: bool) -> str:
    first = _word(draw, unseen, draw.choice((GIRLS, BOYS))).capitalize()
    return f"{first} {draw.choice(LAST_NAMES)}" if draw.random() < 0.3 else first


def _title(draw: random.Random, unseen: bool) -> str:
    shape = draw.randrange(4)
    if shape == 0:
        return f"{_word(draw, unseen)} {draw.choice(EVENTS)}".capitalize()
    if shape == 1:
        return f"The {draw.choice(WORDS['colors'])} {_word(draw, unseen)}".title()
    return " ".join(_word(draw, unseen).capitalize() for _ in range(shape - 1))


def _message(draw: random.Random, unseen: bool) -> str:
    template = draw.choice(MESSAGES)
    while unseen and "{}" not in template:
        template = draw.choice(MESSAGES)
    return template.format(*(_word(draw, unseen) for _ in range(2)))


def _task(draw: random.Random, unseen: bool) -> str:
    return draw.choice(TASKS).format(_word(draw, unseen))


def _topic(draw: random.Random, unseen: bool) -> str:
    first = _word(draw, unseen)
    return (
        first if draw.random() < 0.4 else f"{draw.choice((*WORDS['colors'], 'cheap', 'old', 'new', 'small'))} {first}"
    )


def _path(draw: random.Random, unseen: bool) -> str:
    name, ending = _word(draw, unseen), draw.choice(("txt", "pdf", "png", "csv", "py", "md"))
    folder = draw.choice(("", "", "docs/", "photos/", "/tmp/", "src/", f"{_word(draw, unseen)}/"))
    return f"{folder}{name}.{ending}"


def _email(draw: random.Random, unseen: bool) -> str:
    name = _word(draw, unseen, draw.choice((GIRLS, BOYS))).lower()
    return f"{name}@{_word(draw, unseen)}.{draw.choice(('com', 'org', 'net'))}"


def _code(draw: random.Random, unseen: bool) -> str:
    return f"{''.join(draw.choices(LETTERS, k=draw.randint(1, 3)))}{draw.choice(('', '-'))}{draw.randint(10, 9999)}"


def _command(draw: random.Random, unseen: bool) -> str:
    return draw.choice(("ls -l {}", "cat {}", "rm {}", "wc -l {}", "mkdir {}", "git add {}")).format(
        _path(draw, unseen)
    )


def _expression(draw: random.Random, unseen: bool) -> str:
    return f"{draw.randint(2, 999)} {draw.choice('+-*/')} {draw.randint(2, 999)}"


def _amount(draw: random.Random, unseen: bool) -> float:
    return draw.choice(
        (draw.randint(1, 999), draw.randint(1, 99) * 10, draw.randint(1, 9999) / 10, draw.randint(1, 9999) / 100)
    )


def _date(draw: random.Random, unseen: bool) -> str:
    return f"{draw.randint(2024, 2030)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"


def _url(draw: random.Random, unseen: bool) -> str:
    return f"https://{_word(draw, unseen)}.com/{_word(draw, unseen)}"


def _address(draw: random.Random, unseen: bool) -> str:
    return f"{_city(draw, unseen)} Street {draw.randint(1, 99)}"


def _time(draw: random.Random, unseen: bool) -> str:
    return f"{draw.randint(0, 23):02}:{draw.randint(0, 59):02}"


def _symbol(draw: random.Random, unseen: bool) -> str:
    return "".join(draw.choices(LETTERS, k=draw.randint(3, 4)))


def _one_of(text: str) -> Make:
    options = words(text)
    return lambda draw, unseen: draw.choice(options)


def _between(low: int, high: int) -> Make:
    return lambda draw, unseen: draw.randint(low, high)


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
KINDS = {
    "city": Kind(STRING, "Name of the city.", _city),
    "person": Kind(STRING, "Name of the person.", _person),
    "title": Kind(STRING, "The title.", _title),
    "message": Kind(STRING, "The text.", _message),
    "task": Kind(STRING, "What to do.", _task),
    "topic": Kind(STRING, "What to look for.", _topic),
    "thing": Kind(STRING, "Name of the thing.", _word),
    "word": Kind(STRING, "One word.", _word),
    "place": Kind(STRING, "Name of the place.", _word),
    "food": Kind(STRING, "Name of the food.", lambda draw, unseen: _word(draw, unseen, WORDS["foods"])),
    "path": Kind(STRING, "Path of the file.", _path),
    "email": Kind(STRING, "Email address.", _email),
    "url": Kind(
        STRING, "Web address.", lambda draw, unseen: f"https://{_word(draw, unseen)}.com/{_word(draw, unseen)}"
    ),
    "address": Kind(
        STRING, "Street and number.", lambda draw, unseen: f"{_city(draw, unseen)} Street {draw.randint(1, 99)}"
    ),
    "code": Kind(STRING, "Letters and digits.", _code),
    "symbol": Kind(
        STRING, "Symbol of the stock.", lambda draw, unseen: "".join(draw.choices(LETTERS, k=draw.randint(3, 4)))
    ),
    "command": Kind(STRING, "The command line.", _command),
    "expression": Kind(STRING, "What to calculate.", _expression),
    "date": Kind(STRING, "Date as YYYY-MM-DD.", _date),
    "time": Kind(STRING, "Time as HH:MM.", _time),
    "room": Kind(STRING, "Name of the room.", _one_of("kitchen bedroom bathroom hall office garage attic")),
    "shop": Kind(STRING, "Kind of place.", _one_of("bakery cafe museum bank cinema library hotel bookshop")),
    "color": Kind(STRING, "Name of the color.", lambda draw, unseen: draw.choice(WORDS["colors"])),
    "language": Kind(STRING, "Name of the language.", _one_of("French German Spanish Italian Dutch Greek")),
    "currency": Kind(STRING, "Code of the currency.", _one_of("USD EUR GBP JPY CHF CAD AUD SEK")),
    "field": Kind(STRING, "Name of a field.", _one_of("name email age city phone country status level")),
    "plural": Kind(STRING, "Name of the table.", _one_of("users orders products events cars books songs rooms")),
    "sky": Kind(STRING, "State of the sky.", _one_of("sunny cloudy rainy windy foggy snowy clear stormy")),
    "few": Kind(INTEGER, "How many.", _between(2, 9)),
    "count": Kind(INTEGER, "How many.", _between(1, 60)),
    "minutes": Kind(INTEGER, "Number of minutes.", _between(1, 180)),
    "percent": Kind(INTEGER, "Value from 0 to 100.", _between(0, 100)),
    "age": Kind(INTEGER, "Age in years.", _between(1, 99)),
    "sides": Kind(INTEGER, "Sides of one die.", _between(4, 20)),
    "warmth": Kind(INTEGER, "Degrees Celsius.", _between(15, 25)),
    "degrees": Kind(INTEGER, "Degrees.", _between(-20, 40)),
    "number": Kind(INTEGER, "A whole number.", _between(61, 4000)),
    "id": Kind(INTEGER, "The id.", _between(100, 99999)),
    "amount": Kind(NUMBER, "The amount.", _amount),
}


def kind_of(text: str) -> Kind | None:
    """A kind from its text: a name of KINDS, NAME* (list of strings), `flag yes/no`, a/b/c (enum); else None."""
    if text.endswith("*"):
        item = KINDS[text[:-1]]
        schema = {"type": "array", "items": item.schema}
        return Kind(schema, "List of names.", lambda draw, unseen: _several(draw, unseen, item))
    if text.startswith("flag "):
        yes, no = text.removeprefix("flag ").split("/")
        about = f"true: {yes}, false: {no}."
        return Kind({"type": "boolean"}, about, lambda draw, unseen: draw.random() < 0.5)
    if "/" in text:
        options = text.split("/")
        return Kind(
            {"type": "string", "enum": options}, "One of the values.", lambda draw, unseen: draw.choice(options)
        )
    return KINDS.get(text)


def _several(draw: random.Random, unseen: bool, item: Kind) -> list[Any]:
    return list(dict.fromkeys(item.make(draw, unseen) for _ in range(draw.randint(1, 4))))


def with_articles(text: str) -> str:
    """`text` with "an" for "a" before a vowel, since templates do not know which word follows."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU](?!se))", r"\1n ", text)


def wording(value: Any, text: str = "") -> str:
    """How a value of kind `text` reads in a sentence."""
    if isinstance(value, bool):
        return text.removeprefix("flag ").split("/")[not value]
    if isinstance(value, list):
        return " and ".join([", ".join(value[:-1]), value[-1]]) if len(value) > 1 else str(value[0])
    return str(value)
