"""Kinds of parts of paths, for routes to name: a colon begins a verb, as in `NAME:predict`.

Route(f"/v1/models/{{name:{MODEL}}}", show_model)
"""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor

MODEL, WORD = "model", "word"


class _Text(Convertor[str]):
    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Model(_Text):
    """A model's reference, or what somebody takes for one, slashes included."""

    regex = "[^:]+"


class _Word(_Text):
    """A version or an alias."""

    regex = "[^/:]+"


register_url_convertor(MODEL, _Model())
register_url_convertor(WORD, _Word())
