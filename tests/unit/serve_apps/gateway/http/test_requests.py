"""What is a JSON body here, and what is refused though other readers take it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from cluster.errors import InputError, PayloadTooLargeError
from serve_apps.gateway.http.requests import (
    MAX_DEPTH,
    MAX_VALUES,
    as_whole_numbers,
    parse_object,
    validate,
)

KEYS = st.text('ab\\"{}[]:,é🌞\n', max_size=4)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | KEYS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(KEYS, VALUES), ascii_only=st.booleans(), indent=st.booleans())
def test_what_json_writes_is_read(values: dict[str, Any], ascii_only: bool, indent: bool) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only, indent=2 if indent else None)
    assert parse_object(text.encode("utf-8", "surrogatepass")) == values


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(KEYS, VALUES, min_size=1), nested=st.booleans(), data=st.data())
def test_a_key_that_stands_twice_is_found(
    values: dict[str, Any], nested: bool, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(values)))
    inside = json.dumps(values)[:-1] + f", {json.dumps(key)}: 1}}"
    text = f'{{"x": [0, {inside}], "y": []}}' if nested else inside
    with pytest.raises(InputError, match="same key twice"):
        parse_object(text.encode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[]", "is an array; send a JSON object"),
        (b'"text"', "is a string"),
        (b"null", "is null; send a JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "infinity"),
        (b'{"a": -1e999}', "infinity"),
        (b'{"a": ' + b"9" * 5000 + b"}", "infinity"),
        (b'{"a": 0x10}', "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": "\xc0\x80"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\udc00\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": "\x00"}', "control character"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b'{"a": 1, "\\u0061": 2}', "same key twice"),
        (b'{"a": {"b": {}}, "a": 1}', "same key twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "depth|deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "depth|deep"),
        (b"[" * 5_000_000, "not valid JSON|values"),
    ],
    ids=repr,
)
def test_what_is_no_object_is_refused_in_one_line(body: bytes, words: str) -> None:
    with pytest.raises((InputError, PayloadTooLargeError), match=words) as caught:
        parse_object(body)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"b": "\xf0\x9f\x8c\x9e", "a": "\\ud800"}', "a"),
        (b'{"a": [{"b": "x"}, {"b": ["y", "\\udc00z"]}]}', "a.1.b.1"),
        (b'{"\\ud800": 1}', None),
        (b'{"a": [{"b": {"\\ud800": 1}}]}', "a.0.b"),
        (b'{"a": "\\ud800", }', None),
        (b'{"a": ' + b"[" * 100 + b'"\\ud800"' + b"]" * 100 + b"}", None),
    ],
)
def test_half_of_a_surrogate_pair_is_named_by_its_field(body: bytes, field: str | None) -> None:
    with pytest.raises(InputError, match="surrogate") as caught:
        parse_object(body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"b": 1, "a": NaN}', "a"),
        (b'{"a": {"b": [0, -Infinity]}}', "a.b.1"),
        (b'{"b": "NaN", "a": 1e999}', "a"),
        (b'{"b": 1e308, "a": ' + b"9" * 400 + b"}", "a"),
        (b'{"a": NaN, }', None),
    ],
)
def test_what_json_has_no_number_for_is_named_by_its_field(body: bytes, field: str | None) -> None:
    with pytest.raises(InputError, match="not valid JSON") as caught:
        parse_object(body)
    assert caught.value.param == field


def test_levels_are_counted_exactly() -> None:
    def nested(levels: int) -> bytes:
        return b'{"[[": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    parse_object(nested(MAX_DEPTH))
    with pytest.raises(InputError, match=f"at most {MAX_DEPTH} levels"):
        parse_object(nested(MAX_DEPTH + 1))


def test_a_body_of_too_many_values_is_refused_before_they_take_memory() -> None:
    body = b'{"a": [' + b"[]," * MAX_VALUES + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLargeError, match=f"most allowed are {MAX_VALUES}"):
            parse_object(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_commas_in_a_text_are_no_values() -> None:
    assert parse_object(json.dumps({"a": "," * (MAX_VALUES + 9)}).encode())["a"][0] == ","


def test_a_byte_order_mark_is_left_out() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


class Asked(BaseModel):
    model_config = {"extra": "forbid"}

    size: int | None = None
    names: str | list[str] = Field("", max_length=3)


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"size": "1"}, "size", "valid integer"),
        ({"size": True}, "size", "valid integer"),
        ({"names": ["a"] * 4}, "names", "at most 3"),
        ({"names": ["a", 1]}, "names", "valid string"),
        ({"nmaes": "a"}, "nmaes", "known are: names, size"),
        ({"x" * 5000: 1}, "x" * 100, "is not known here"),
    ],
)
def test_the_first_thing_wrong_is_named(values: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        validate(Asked, values)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


def test_whole_floats_are_integers() -> None:
    assert as_whole_numbers([1.0, [2.0, 2.5], "3.0", True]) == [1, [2, 2.5], "3.0", True]
    assert type(as_whole_numbers(1.0)) is int
