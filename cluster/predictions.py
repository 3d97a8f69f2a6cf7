"""How the output of `jobs.predict` lies in storage, and what can be read of it while it grows.

manifest.json     written first: the digests of the input and of the version, and the config
rows/00000.jsonl  (or .parquet) the answers of a part, in the input's order
parts/00000.json  written after them: the part is done; how many rows, which were bad
errors.jsonl      written last: every bad row, with its number and the reason

prediction = StoredPrediction(storage, "predictions/digits")
for summary in prediction.done().values(): print(summary.num_rows)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError
from cluster.storage import Storage

MANIFEST, ERRORS = "manifest.json", "errors.jsonl"
PARTS, ROWS = "parts", "rows"


@dataclass(frozen=True)
class PartSummary:
    """What became of one part."""

    number: int
    num_rows: int
    """Answered ones."""
    prompt_tokens: int
    completion_tokens: int
    bad_rows: tuple[dict[str, Any], ...]
    """Each with `row`, `where`, `reason`, and the columns that are kept."""


class StoredPrediction:
    """One output; `prefix` is its folder below the storage's root, empty for the root itself."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return self._storage.path(self._prefix) if self._prefix else self._storage.root

    @property
    def is_whole(self) -> bool:
        return self._storage.exists(self.key(ERRORS))

    def done(self) -> dict[int, PartSummary]:
        """The parts that are written, by their number."""
        keys = self._storage.list(self.key(PARTS))
        found = [self.read(f"{PARTS}/{key.rpartition('/')[2]}") for key in keys]
        summaries = (PartSummary(**{**v, "bad_rows": tuple(v["bad_rows"])}) for v in found)
        return {summary.number: summary for summary in summaries}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The answers of the parts that are written, in the input's order; JSONL only."""
        for number in sorted(self.done()):
            data = self._storage.read_bytes(self.key(rows_name(number, "jsonl")))
            yield from (json.loads(line) for line in data.split(b"\n") if line)

    def read(self, name: str) -> dict[str, Any]:
        """One of its JSON files."""
        try:
            values = json.loads(self._storage.read_bytes(self.key(name)))
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InputError(
                f"'{name}' in {self.place} is not what jobs.predict writes",
                hint="choose another output",
                param="output",
            )
        return values

    def key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name


def rows_name(number: int, form: str) -> str:
    """The file of a part's answers."""
    return f"{ROWS}/{number:05d}.{form}"
