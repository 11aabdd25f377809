"""The formats that are said as patterns: exactly what Python's own readers accept."""

import datetime
import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4serve.constrained.schemas import FORMATS, check_enforceable, exact_pattern, with_exact_strings
from dsv4serve.types import InvalidRequest


def reads(reader, text):
    try:
        reader(text)
    except ValueError:
        return False
    return True


@given(
    year=st.one_of(st.integers(0, 9999), st.sampled_from([0, 1, 4, 100, 400, 1900, 2000, 2024])),
    month=st.integers(0, 13),
    day=st.one_of(st.integers(0, 32), st.integers(28, 31)),
)
def test_dates(year, month, day):
    text = f"{year:04}-{month:02}-{day:02}"
    assert bool(re.fullmatch(FORMATS["date"], text)) == reads(datetime.date.fromisoformat, text)


@given(part=st.lists(st.one_of(st.integers(0, 300).map(str), st.integers(0, 300).map("{:03}".format)), min_size=4))
def test_ipv4(part):
    text = ".".join(part)
    assert bool(re.fullmatch(FORMATS["ipv4"], text)) == reads(ipaddress.IPv4Address, text)


@given(date=st.dates(), time=st.times(), minutes=st.integers(-1439, 1439))
def test_whatever_python_writes_is_a_date_time(date, time, minutes):
    zone = datetime.timezone(datetime.timedelta(minutes=minutes))
    text = datetime.datetime.combine(date, time, zone).isoformat()
    assert re.fullmatch(FORMATS["date-time"], text)
    assert re.fullmatch(FORMATS["time"], text[11:])


@given(text=st.from_regex(FORMATS["date-time"], fullmatch=True))
def test_whatever_is_a_date_time_python_reads(text):
    datetime.datetime.fromisoformat(re.sub(r"(\.[0-9]{6})[0-9]*", r"\1", text.rstrip("\n")))


def test_formats_become_patterns_wherever_a_schema_stands_and_nowhere_else():
    def schema(leaf):
        return {
            "$defs": {"a": leaf},
            "properties": {
                "format": {"type": "array", "items": leaf},
                "b": {"anyOf": [leaf, {"enum": [{"format": 1}]}]},
            },
            "additionalProperties": leaf,
            "default": {"format": "date"},
        }

    leaf = {"type": "string", "format": "date"}
    said = {"type": "string", "pattern": exact_pattern(FORMATS["date"])}
    assert with_exact_strings(schema(leaf)) == schema(said)
    for other in ({"type": "string", "format": "email"}, {**leaf, "minLength": 3}, {**leaf, "pattern": "x"}, True):
        assert with_exact_strings(other) == other


@pytest.mark.parametrize("name", ["json-pointer", "relative-json-pointer"])
def test_formats_that_would_break_the_json_are_refused(name):
    with pytest.raises(InvalidRequest) as caught:
        check_enforceable({"properties": {"a": {"type": "string", "format": name}}}, "schema")
    assert caught.value.param == "schema.properties.a.format"
