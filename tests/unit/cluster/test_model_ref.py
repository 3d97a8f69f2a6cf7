import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidReferenceError
from cluster.model_ref import ModelRef


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", ModelRef("digits")),
        ("digits@candidate", ModelRef("digits", alias="candidate")),
        ("digits/3", ModelRef("digits", version=3)),
        ("models:/digits@champion", ModelRef("digits", alias="champion")),
        ("models:/digits/12", ModelRef("digits", version=12)),
        ("Qwen2.5-0.5B", ModelRef("Qwen2.5-0.5B")),
    ],
)
def test_references_people_write(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "@a", "a@", "/1", "a/", "a/0", "a/-1", "a/x", "a/1/2", "a@b@c", "a/1@b", "../etc",
        "a..b", "a b", "a\x00", "a\n", "dígits", "digits/１", "%2e%2e", "a" * 129, ".hidden",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        ModelRef.parse(text)


@given(st.text())
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        ref = ModelRef.parse(text)
    except InvalidReferenceError:
        return
    assert ModelRef.parse(str(ref)).name == ref.name


@given(st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True), st.integers(1, 10**9 - 1))
def test_a_version_reference_round_trips(name: str, version: int) -> None:
    ref = ModelRef(name, version=version)
    assert ModelRef.parse(str(ref)) == ref
