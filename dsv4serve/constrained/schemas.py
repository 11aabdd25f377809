"""Which JSON schemas a grammar can enforce. What it cannot would be ignored in silence, so it is refused."""

from __future__ import annotations

import re
from typing import Any

from jsonschema import Draft202012Validator

from dsv4serve.types import InvalidRequest

MAX_DEPTH = 32  # schemas inside each other
MAX_COUNT = 10_000  # of characters, items or properties
ANNOTATIONS = frozenset(
    ("$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly")
).union(("writeOnly", "discriminator", "contentMediaType", "contentEncoding"))
DEFINITIONS = frozenset(("$defs", "definitions"))
# Keywords by the type that they need.
TYPED = {
    "object": {
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
        "maxProperties",
    },
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}  # fmt: skip
TYPED["integer"] = TYPED["number"]
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Where schemas stand in a schema.
MAPS_OF_SCHEMAS = (*DEFINITIONS, "properties", "patternProperties")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "propertyNames")
ALONE = ("$ref", "anyOf", "oneOf", "allOf")  # where one of these stands, the grammar sees nothing else
KNOWN = frozenset(("type", "enum", "const", *ALONE)).union(*TYPED.values(), ANNOTATIONS, DEFINITIONS)

# Formats that xgrammar reads too generously (leading zeros, February 31) as patterns that are exact, Gregorian years 1
# to 9999; no leap seconds, which most readers refuse.
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_YEAR = "([1-9][0-9][0-9][0-9]|0[1-9][0-9][0-9]|00[1-9][0-9]|000[1-9])"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DAYS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = f"({_YEAR}-({_DAYS})|([0-9][0-9]{_FOURTH}|{_FOURTH}00)-02-29)"
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_CLOCK}:[0-5][0-9](\\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})"
FORMATS = {
    "ipv4": rf"^({_BYTE}\.){{3}}{_BYTE}$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}
NOT_JSON = frozenset(("json-pointer", "relative-json-pointer"))  # xgrammar lets quotes into these


def with_exact_strings(schema: Any, depth: int = 0) -> Any:
    """`schema`, a valid one, with its patterns, and the FORMATS in it, said so that xgrammar reads them right."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return schema
    exact = dict(schema)
    if _format(schema) in FORMATS and not schema.keys() & {"pattern", "minLength", "maxLength"}:
        exact["pattern"] = FORMATS[exact.pop("format")]
    if isinstance(exact.get("pattern"), str):
        exact["pattern"] = exact_pattern(exact["pattern"])
    for key, part in schema.items():
        if key in MAPS_OF_SCHEMAS and isinstance(part, dict):
            named = exact_pattern if key == "patternProperties" else str
            exact[key] = {named(name): with_exact_strings(value, depth + 1) for name, value in part.items()}
        elif key in LISTS_OF_SCHEMAS and isinstance(part, list):
            exact[key] = [with_exact_strings(value, depth + 1) for value in part]
        elif key in SCHEMAS:
            exact[key] = with_exact_strings(part, depth + 1)
    return exact


def exact_pattern(pattern: str) -> str:
    """The same language without optional groups: in patterns xgrammar 0.2.8 reads (ab+)? as a?b*, and (ab+|) right."""
    tokens, in_class = [], False
    for match in re.finditer(r"\\.|\)\?\??|.", pattern, re.DOTALL):
        token = match[0]
        if in_class:
            in_class = token != "]"
        elif token == "[":
            in_class = True
        elif token.startswith(")?"):
            token = "|)"
        tokens.append(token)
    return "".join(tokens)


def check_enforceable(schema: Any, where: str, depth: int = 0) -> None:
    """Raise InvalidRequest, naming the place, unless all that `schema` says can be enforced. It is a valid schema."""
    if isinstance(schema, bool):
        return
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"schemas may be nested {MAX_DEPTH} deep", where)
    unknown = sorted(key for key in schema if key not in KNOWN and not key.startswith("x-"))
    if unknown:
        raise InvalidRequest(f"the keyword {unknown[0]!r} cannot be enforced; leave it out", where)
    said = set(schema) - ANNOTATIONS - DEFINITIONS
    _check_combination(schema, said, where)
    for key in COUNTS:
        if schema.get(key, 0) > MAX_COUNT:
            raise InvalidRequest(f"{schema[key]} is above {MAX_COUNT}, the most that can be counted", f"{where}.{key}")
    for key in MAPS_OF_SCHEMAS:
        for name, part in schema.get(key, {}).items():
            check_enforceable(part, f"{where}.{key}.{name}", depth + 1)
    for key in LISTS_OF_SCHEMAS:
        for index, part in enumerate(schema.get(key, ())):
            check_enforceable(part, f"{where}.{key}.{index}", depth + 1)
    for key in SCHEMAS:
        if key in schema:
            check_enforceable(schema[key], f"{where}.{key}", depth + 1)


def _format(schema: dict[str, Any]) -> str:
    """Its format; a property that is called so is no string."""
    value = schema.get("format")
    return value if isinstance(value, str) else ""


def _check_combination(schema: dict[str, Any], said: set[str], where: str) -> None:
    for key in ALONE:
        if key in said and len(said) > 1:
            beside = sorted(said - {key})[0]
            raise InvalidRequest(f"{beside!r} beside {key!r} cannot be enforced; say it inside", where)
    if len(schema.get("allOf", ())) > 1:
        raise InvalidRequest("only an allOf of one schema can be enforced", f"{where}.allOf")
    if not schema.get("$ref", "#").startswith("#"):
        raise InvalidRequest("only references inside the schema (#/...) can be followed", f"{where}.$ref")
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        plain = {key: schema[key] for key in said if key not in ("enum", "const")}
        if any(not Draft202012Validator(plain).is_valid(value) for value in values):
            raise InvalidRequest("a value of enum or const does not match the keywords beside it", where)
        return
    types = schema.get("type", "object" if said & TYPED["object"] else [])
    allowed = set().union({"type"}, *(TYPED.get(name, ()) for name in ([types] if isinstance(types, str) else types)))
    homeless = sorted(said - allowed - set(ALONE))
    if homeless:
        raise InvalidRequest(f"the keyword {homeless[0]!r} does not belong to the type here; name the type", where)
    if "pattern" in said and said & {"minLength", "maxLength", "format"}:
        raise InvalidRequest("pattern beside minLength, maxLength or format cannot be enforced", where)
    if _format(schema) in NOT_JSON:
        raise InvalidRequest(f"the format {schema['format']!r} cannot be enforced; leave it out", f"{where}.format")
    if "format" in said and said & {"minLength", "maxLength"}:
        raise InvalidRequest("format beside minLength or maxLength cannot be enforced", where)
    missing = sorted(set(schema.get("required", ())) - set(schema.get("properties", {})))
    if missing:
        raise InvalidRequest(f"{missing[0]!r} is required but not among the properties", f"{where}.required")
