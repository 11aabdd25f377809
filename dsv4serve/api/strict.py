"""The base of all bodies: which fields are known, which are ignored, and which do not exist yet."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from dsv4serve.types import InvalidRequest

# Fields of known APIs that a route, or this server, does not have, with the values that ask for nothing.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_reasoning": (None, True),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "separate_reasoning": (None, True),
    "stream_reasoning": (None, True),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
# Accepted and without effect here.
IGNORED = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)


class Strict(BaseModel):
    """Base of all bodies: no number in a string, no boolean as a number; unknown fields are not refused."""

    model_config = ConfigDict(strict=True, extra="allow")

    def unknown_fields(self) -> list[str]:
        """Dotted names of what was sent and means nothing here. The answer names them, so that a typo is found."""
        names = list(self.model_extra or ())
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Strict):
                names += [f"{name}.{inner}" for inner in value.unknown_fields()]
        return names

    @model_validator(mode="before")
    @classmethod
    def _take_out(cls, raw: Any) -> Any:
        """Drop what is ignored; refuse what does not exist yet unless its value asks for nothing."""
        if not isinstance(raw, dict):
            return raw
        for name in raw:
            if isinstance(name, str) and name.startswith("guided_"):
                hint = "use structured_outputs with json, regex, choice or grammar"
                raise InvalidRequest(f"{name} is an old name; {hint}", name)
        ignored = set(IGNORED).difference(cls.model_fields)
        absent = {name: neutral for name, neutral in NOT_YET.items() if name not in cls.model_fields}
        for name, neutral in absent.items():
            if name in raw and not any(type(raw[name]) is type(v) and raw[name] == v for v in _widen(neutral)):
                raise InvalidRequest(f"{name} is not supported here", name)
        return {key: value for key, value in raw.items() if key not in absent and key not in ignored}


def _widen(neutral: tuple[Any, ...]) -> tuple[Any, ...]:
    """A neutral number counts as int and as float."""
    return neutral + tuple(float(value) for value in neutral if type(value) is int)
