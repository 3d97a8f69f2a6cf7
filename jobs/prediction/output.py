"""The output: parts that appear whole or not at all, and a manifest that says what they are of.

See `cluster.predictions` for its files. An output that was begun is gone on with, unless anything
in its manifest would be another now. It knows nothing of models.

    output = Output.open("storage://predictions/rows", settings)
    output.begin({"input": "sha256:…", …})
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.errors import ConflictError
from cluster.predictions import ERRORS, MANIFEST, PARTS, PartSummary, StoredPrediction, rows_name
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.prediction.source import STORAGE_SCHEME, Format

_RUN = "run.json"
"""Whose work it is: the MLflow run, and what the ledger knows it by."""


class Output(StoredPrediction):
    """One place for one prediction, to write to."""

    @classmethod
    def open(cls, location: str, settings: Settings) -> Output:
        """Open `storage://KEY`, a folder or the URL of one; nothing is written yet."""
        if location.startswith(STORAGE_SCHEME):
            prefix = location.removeprefix(STORAGE_SCHEME).rstrip("/")
            return cls(Storage.open(settings.storage_root), prefix)
        return cls(Storage.open(location), "")

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or find the same one there.

        Raises:
            ConflictError: there is an output of another input, version or config.
        """
        text = _to_json(manifest)
        if not self._storage.exists(self.key(MANIFEST)):
            self._storage.write_bytes(self.key(MANIFEST), text)
            return
        found = self.read(MANIFEST)
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
        return self.read(_RUN) if self._storage.exists(self.key(_RUN)) else {}

    def keep_run(self, values: Mapping[str, Any]) -> None:
        self._storage.write_bytes(self.key(_RUN), _to_json(values))

    def write_part(self, summary: PartSummary, rows: bytes, form: Format) -> None:
        """A part's rows, and then that it is done."""
        self._storage.write_bytes(self.key(rows_name(summary.number, form)), rows)
        name = f"{PARTS}/{summary.number:05d}.json"
        self._storage.write_bytes(self.key(name), _to_json(asdict(summary)))

    def finish(self, errors: bytes) -> None:
        """Write what is said of bad rows: the output is whole."""
        self._storage.write_bytes(self.key(ERRORS), errors)


def _difference(name: str, found: Mapping[str, Any]) -> str:
    return f"{name} ({str(found.get(name))[:80]})" if name != "config" else "config"


def _to_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"
