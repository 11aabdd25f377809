"""Which JSON schemas a grammar can enforce. What it cannot would be ignored in silence, so it is refused."""

from __future__ import annotations

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
ALONE = ("$ref", "anyOf", "oneOf", "allOf")  # where one of these stands, the grammar sees nothing else
KNOWN = frozenset(("type", "enum", "const", *ALONE)).union(*TYPED.values(), ANNOTATIONS, DEFINITIONS)


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
    for key in (*DEFINITIONS, "properties", "patternProperties"):
        for name, part in schema.get(key, {}).items():
            check_enforceable(part, f"{where}.{key}.{name}", depth + 1)
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for index, part in enumerate(schema.get(key, ())):
            check_enforceable(part, f"{where}.{key}.{index}", depth + 1)
    for key in ("items", "additionalProperties", "propertyNames"):
        if key in schema:
            check_enforceable(schema[key], f"{where}.{key}", depth + 1)


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
    if "format" in said and said & {"minLength", "maxLength"}:
        raise InvalidRequest("format beside minLength or maxLength cannot be enforced", where)
    missing = sorted(set(schema.get("required", ())) - set(schema.get("properties", {})))
    if missing:
        raise InvalidRequest(f"{missing[0]!r} is required but not among the properties", f"{where}.required")
