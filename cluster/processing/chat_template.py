"""Chat templates: the small programs that tokenizers bring along, run so that they do no harm.

They are compiled as transformers does, but cannot reach or change anything, are not told the time
(the same conversation is the same text), and are stopped when they work without end. Knows nothing
of tokens.

    text, answers = render_chat(source, messages, add_generation_prompt=True, eos_token="</s>")
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Spans = list[tuple[int, int]]
"""First character of each, and one past its last."""

_MAX_STEPS = 1_000_000
"""Of all loops together, in one rendering."""
_MAX_GROWTH = 10_000_000
"""Characters, items or bits that one operator may make."""
# No name that a template could write.
_STEPS_LEFT = "steps left"
_NONCE = secrets.token_hex(8)
_BEGIN, _END = f"\ue000{_NONCE}<\ue001", f"\ue000{_NONCE}>\ue001"


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    **special_tokens: str,
) -> tuple[str, Spans]:
    """The conversation as the template writes it, and what it marks with `{% generation %}`.

    Raises:
        Exception: whatever the template does; it may divide by zero or refuse the messages.
    """
    variables = {
        **special_tokens,
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        _STEPS_LEFT: iter(range(_MAX_STEPS)),
    }
    return _without_marks(str(_compile(source).render(variables)))


def _without_marks(rendered: str) -> tuple[str, Spans]:
    text, begin = "", 0
    spans: Spans = []
    for piece in re.split(f"({_BEGIN}|{_END})", rendered):
        if piece == _BEGIN:
            begin = len(text)
        elif piece == _END:
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, spans


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    from jinja2 import TemplateError, nodes, pass_context
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what is to be learnt."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _growth(operator, left, right) > _MAX_GROWTH:
                raise TemplateError(f"'{operator}' makes more than {_MAX_GROWTH:,} characters")
            return super().call_binop(context, operator, left, right)

    @pass_context
    def counted(context: Any, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if next(context[_STEPS_LEFT], None) is None:
                raise TemplateError(f"its loops take more than {_MAX_STEPS:,} steps")
            yield item

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.filters[_STEPS_LEFT] = counted
    environment.globals["raise_exception"] = raise_exception
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, _STEPS_LEFT, [], [], None, None, lineno=loop.lineno)
    return environment.from_string(tree)


def _growth(operator: str, left: Any, right: Any) -> int:
    """How many characters, items or bits come out, where these are what may grow."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits * abs(right) if operator == "**" else bits + right.bit_length()
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            return len(items) * times
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
