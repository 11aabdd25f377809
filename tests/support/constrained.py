"""A vocabulary of 96 ids for the small models of the tests, and structural tags."""

import json

from dsv4serve.constrained.vocabulary import MARKER, Vocabulary
from dsv4serve.types import Constraint

EOS, MARKER_ID, END_THINK = 1, 2, 3
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-+E \n<>=/_\\'
PIECES = ["true", "false", "null", '{"', '": ', "tool_calls>", "invoke", "parameter", "name=", "string=", "</", "\n\n"]
TEXTS = [*CHARACTERS, *PIECES]
TOKEN_BYTES = [b"", b"", MARKER.encode(), b"", *(text.encode() for text in TEXTS)]
VOCABULARY = Vocabulary(TOKEN_BYTES + [b""] * (96 - len(TOKEN_BYTES)), EOS, MARKER_ID)


def decode(ids: list[int]) -> str:
    """Text of ids; the marker is written as a model's output shows it."""
    text = b"".join(VOCABULARY.token_bytes[i] for i in ids).decode()
    return text.replace(MARKER, "\uff5cDSML\uff5c")


def tag(format: dict, after_id: int | None = None) -> Constraint:
    """A constraint of one structural format."""
    return Constraint(json.dumps({"type": "structural_tag", "format": format}), after_id)


def schema(value: dict, after_id: int | None = None) -> Constraint:
    """A constraint to a JSON schema."""
    return tag({"type": "json_schema", "json_schema": value, "max_whitespace_cnt": 2}, after_id)
