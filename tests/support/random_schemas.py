"""Random JSON schemas of all that a grammar can enforce."""

import random
from typing import Any

NAMES = ("a", "name", "x y", "größe", "id", 'q"uote')


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that some text matches, nested at most `depth` deep."""
    plain = [_string, _integer, _number, _enum, _flag]
    return draw.choice(plain if depth == 0 else [*plain, *[_object, _array, _any_of] * 2])(draw, depth)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(0, 4)
    return draw.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 5)},
            {
                "type": "string",
                "pattern": draw.choice(["^[a-z]{1,5}$", "^(x|yz)+[0-9]$", "^[A-Z][a-z ]*$", "^a(b+c)?$"]),
            },
            {"type": "string", "format": draw.choice(["date", "date-time", "email", "uuid", "ipv4"])},
        ]
    )


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-200, 200)
    return draw.choice(
        [{"type": "integer"}, {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 999)}]
    )


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    return draw.choice([{"type": "number"}, {"type": "number", "minimum": -1.5, "maximum": 2.25}])


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample(["a", "b c", "\n", 1, -2.5, True, None, ["x"], {"k": 1}], draw.randint(1, 4))}


def _flag(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(0, 4))
    value: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
    }
    if draw.random() < 0.3:
        value["additionalProperties"] = draw.choice([True, False, {"type": "integer"}])
    return value


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(draw, depth - 1),
        "minItems": low,
        "maxItems": low + draw.randint(0, 3),
    }


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
