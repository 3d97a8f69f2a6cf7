"""Conversations that ship with Python: what its functions do, by the first sentences of their help.

Small and always there, to try supervised fine-tuning on. It knows nothing about tokens.

    next(python_help()).content     # [{"role": "user", "content": "What does abs do?"}, …]
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from jobs.data.documents import Document

_MODULES = (
    "builtins", "argparse", "asyncio", "bisect", "calendar", "collections", "contextlib", "copy",
    "csv", "datetime", "decimal", "difflib", "email.utils", "fractions", "functools", "glob",
    "hashlib", "heapq", "html", "inspect", "io", "itertools", "json", "logging", "math", "operator",
    "os", "os.path", "pathlib", "pprint", "queue", "random", "re", "shutil", "socket", "statistics",
    "string", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "types",
    "unicodedata", "urllib.parse", "uuid", "zipfile",
)  # fmt: skip
_MAX_ANSWER_CHARACTERS = 240


def python_help() -> Iterator[Document]:
    """One question and its answer each, by the order of names."""
    for name, answer in sorted(_answers().items()):
        question = f"What does {name} do?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield Document(turns, functools.partial(str, f"help of {name}"))


def _answers() -> dict[str, str]:
    found: dict[str, str] = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, value in _public(module):
            if getattr(value, "__module__", module_name) not in (module_name, f"_{module_name}"):
                continue
            _add(found, prefix + name, value)
            if inspect.isclass(value):
                for member, function in _public(value):
                    if member in vars(value):
                        _add(found, f"{prefix}{name}.{member}", function)
    return found


def _public(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(vars(owner)):
        value = getattr(owner, name, None)
        if not name.startswith("_") and callable(value):
            yield name, value


def _add(found: dict[str, str], name: str, value: Any) -> None:
    for paragraph in (inspect.getdoc(value) or "").split("\n\n"):
        text = " ".join(paragraph.split())
        # The first lines of older help texts are signatures.
        if "->" not in text and not text.startswith(f"{name.rpartition('.')[2]}("):
            if text.endswith(".") and len(text) <= _MAX_ANSWER_CHARACTERS:
                found[name] = text
            return
