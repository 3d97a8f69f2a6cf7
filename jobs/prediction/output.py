"""The output: parts that appear whole or not at all, and a manifest that says what they are of.

    manifest.json     written first: the digests of the input and of the version, and the config
    rows/00000.jsonl  (or .parquet) the answers of a part, in the input's order
    parts/00000.json  written after them: the part is done; how many rows, which were bad
    errors.jsonl      written last: every bad row, with its number and the reason
    run.json          whose work it is: the MLflow run and the ledger's source

An output that was begun is gone on with, unless anything in its manifest would be another now. It
knows nothing of models.

    output = Output.open("storage://predictions/rows", settings)
    output.begin({"input": "sha256:…", …})
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import ConflictError, InputError
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.prediction.rows import Values
from jobs.prediction.source import STORAGE_SCHEME, Format

MANIFEST, RUN, ERRORS = "manifest.json", "run.json", "errors.jsonl"
_PARTS, _ROWS = "parts", "rows"


@dataclass(frozen=True)
class PartSummary:
    """What became of one part."""

    number: int
    num_rows: int
    """Answered ones."""
    prompt_tokens: int
    completion_tokens: int
    bad_rows: tuple[Values, ...]


class Output:
    """One place for one prediction."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix

    @classmethod
    def open(cls, location: str, settings: Settings) -> Output:
        """Open `storage://KEY`, a folder or the URL of one; nothing is written yet."""
        if location.startswith(STORAGE_SCHEME):
            prefix = location.removeprefix(STORAGE_SCHEME).rstrip("/")
            return cls(Storage.open(settings.storage_root), prefix)
        return cls(Storage.open(location), "")

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return self._storage.path(self._prefix) if self._prefix else self._storage.root

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or find the same one there.

        Raises:
            ConflictError: there is an output of another input, version or config.
        """
        text = _to_json(manifest)
        if not self._storage.exists(self._key(MANIFEST)):
            self._storage.write_bytes(self._key(MANIFEST), text)
            return
        found = self._read(MANIFEST)
        expected = json.loads(text)
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise ConflictError(
                    f"{self.place} holds a prediction with another {_difference(name, found)}",
                    hint="choose another output, or delete that one",
                    param="output",
                )

    def run(self) -> dict[str, Any]:
        """What `keep_run` was given; empty before."""
        return self._read(RUN) if self._storage.exists(self._key(RUN)) else {}

    def keep_run(self, values: Mapping[str, Any]) -> None:
        self._storage.write_bytes(self._key(RUN), _to_json(values))

    def done(self) -> dict[int, PartSummary]:
        """The parts that are written, by their number."""
        keys = self._storage.list(self._key(_PARTS))
        found = [self._read(f"{_PARTS}/{key.rpartition('/')[2]}") for key in keys]
        summaries = (PartSummary(**{**v, "bad_rows": tuple(v["bad_rows"])}) for v in found)
        return {summary.number: summary for summary in summaries}

    def write_part(self, summary: PartSummary, rows: bytes, form: Format) -> None:
        """A part's rows, and then that it is done."""
        name = f"{summary.number:05d}"
        self._storage.write_bytes(self._key(f"{_ROWS}/{name}.{form}"), rows)
        self._storage.write_bytes(self._key(f"{_PARTS}/{name}.json"), _to_json(asdict(summary)))

    def finish(self, errors: bytes) -> None:
        """Write what is said of bad rows: the output is whole."""
        self._storage.write_bytes(self._key(ERRORS), errors)

    @property
    def is_finished(self) -> bool:
        return self._storage.exists(self._key(ERRORS))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads(self._storage.read_bytes(self._key(name)))
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InputError(
                f"'{name}' in {self.place} is not what jobs.predict writes",
                hint="choose another output",
                param="output",
            )
        return values

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name


def _difference(name: str, found: Mapping[str, Any]) -> str:
    shown = f"{found.get(name)}"
    return f"{name} ({shown[:80]})" if name != "config" else "config"


def _to_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"
