"""A batch's work in storage: the rows of its job, and the files that its answers become.

work = BatchWork(files, storage, BatchOptions())
counts = work.translate(batch)
job = work.job(batch)
output_id, error_id = work.write_files(batch, reason="")
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from cluster.batches import Batch
from cluster.config import StrictModel
from cluster.errors import InputError, NotFoundError
from cluster.predictions import StoredPrediction
from cluster.storage import Storage
from cluster.tenant_files import TenantFiles
from serve_apps.gateway.batches.lines import (
    CUSTOM_ID,
    ENDPOINTS,
    MAX_LINE_BYTES,
    META,
    TOKENS,
    LineError,
    answer_line,
    line_of,
    read_request,
    refused_line,
    to_rows,
    unanswered_line,
)
from serve_apps.gateway.batches.lines import Request as LineRequest
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.openai.schema import TextLimits

_MAX_ERRORS = 100
_TOO_MANY = "too_many_requests"


class BatchOptions(StrictModel):
    """How batches are run beside live traffic."""

    max_running: int = Field(1, ge=1, le=1000)
    """Batches whose job is at work, on the whole cluster; others wait their turn."""
    max_requests: int = Field(50_000, ge=1, le=10_000_000)
    """Lines of one batch."""
    max_row_bytes: int = Field(1024**3, ge=1)
    """Of what a batch asks for, each prompt as often as it is to be answered."""
    completion_window_s: float = Field(86_400, gt=0)
    nice: int = Field(19, ge=0, le=19)
    """How far workers stand back for live traffic on the same CPUs: 19 is the most."""
    num_workers: int = Field(1, ge=1, le=1024)
    num_cpus: float = Field(1, ge=0, le=256)
    """CPUs that a worker reserves, so that it waits while training has them all."""
    num_threads: int = Field(1, ge=1, le=256)
    num_gpus: float = Field(0, ge=0, le=1)
    batch_size: int = Field(8, ge=1, le=65_536)
    """Requests that a worker answers at once."""
    rows_per_part: int = Field(64, ge=1, le=1_000_000)
    """Requests that are lost together where a job is killed, and then answered again."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Jobs of a batch that may fail."""
    poll_s: float = Field(1.0, gt=0, le=3600)
    lease_s: float = Field(30.0, gt=0, le=3600)
    """How long a silent replica keeps its batches from the others."""


class BatchError(Exception):
    """The batch cannot be begun."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors)
        self.errors = errors


class BatchWork:
    """What is read and written for batches."""

    def __init__(
        self, files: TenantFiles, storage: Storage, options: BatchOptions, limits: TextLimits
    ) -> None:
        self._files = files
        self._storage = storage
        self._options = options
        self._limits = limits

    def translate(self, batch: Batch, model: ServedModel) -> dict[str, int]:
        """Write the rows of the batch's job, and what is refused before it.

        Raises:
            BatchError: lines that cannot be lines of this batch.
        """
        errors: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        seen: set[str] = set()
        total = num_rows = num_bytes = 0
        most = self._options.max_requests

        def rows() -> Iterator[bytes]:
            nonlocal total, num_rows, num_bytes
            file = self._files.get(batch.tenant, batch.input_file_id)
            lines = self._files.lines(file, max_bytes=MAX_LINE_BYTES)
            for number, line in enumerate(lines, start=1):
                # Blank ones are no requests, but take their time too.
                if not line.strip() and number <= 2 * most:
                    continue
                total += 1
                try:
                    if total > most or number > 2 * most:
                        raise LineError(_TOO_MANY, f"the file has more than {most:,} requests")
                    request = read_request(number, line, endpoint=batch.endpoint)
                    _check_line(number, request, batch, seen)
                except LineError as error:
                    errors.append(batch_error(error.reason, error.message, number, error.param))
                    if len(errors) >= _MAX_ERRORS or error.reason == _TOO_MANY:
                        return
                    continue
                try:
                    found = to_rows(number, request, batch.endpoint, model, self._limits)
                except InputError as error:
                    place = {CUSTOM_ID: request.custom_id, META: {"line": number}}
                    refused.append({META: place[META]} | refused_line(batch, place, error))
                    continue
                num_rows += len(found)
                for row in map(_to_line, found):
                    num_bytes += len(row)
                    if num_bytes > self._options.max_row_bytes:
                        errors.append(_too_large(number, self._options.max_row_bytes))
                        return
                    yield row

        try:
            self._storage.write_chunks(_place(batch, "input.jsonl"), rows())
        except NotFoundError:
            errors.append(batch_error("invalid_file", "the input file was deleted"))
        if not total and not errors:
            errors.append(batch_error("empty_file", "the input file has no requests"))
        if errors:
            self._storage.delete_dir(_place(batch))
            raise BatchError(errors)
        lines = b"".join(_to_line(line) for line in refused)
        self._storage.write_bytes(_place(batch, "refused.jsonl"), lines)
        return {
            "total": total,
            "completed": 0,
            "failed": len(refused),
            "refused": len(refused),
            "rows": num_rows,
        }

    def job(self, batch: Batch) -> dict[str, Any]:
        """The config of the batch's job."""
        options = self._options
        tokens = [] if ENDPOINTS[batch.endpoint].is_text else [TOKENS]
        return {
            "model": batch.version,
            "input": f"storage://{_place(batch, 'input.jsonl')}",
            "output": f"storage://{_place(batch, 'output')}",
            "keep": [CUSTOM_ID, META, *tokens],
            "tokens": "".join(tokens),
            "generation": {"seed": int(hashlib.sha256(batch.id.encode()).hexdigest()[:15], 16)},
            "rows_per_part": options.rows_per_part,
            "batch_size": options.batch_size,
            "num_threads": options.num_threads,
            "num_workers": options.num_workers,
            "num_cpus": options.num_cpus,
            "num_gpus": options.num_gpus,
            "nice": options.nice,
            "max_bad_rows": None,
            "tenant": batch.tenant,
            "api_key_id": batch.api_key_id,
            "experiment": "batches",
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        """What is done so far; a request that has several answers counts in proportion."""
        parts = self._prediction(batch).done().values()
        known = batch.counts
        done = sum(part.num_rows for part in parts)
        bad = {line_of(row) for part in parts for row in part.bad_rows}
        lines = known["total"] - known["refused"]
        return {
            **known,
            "completed": min(done * lines // max(1, known["rows"]), lines - len(bad)),
            "failed": known["refused"] + len(bad),
            "prompt_tokens": sum(part.prompt_tokens for part in parts),
            "completion_tokens": sum(part.completion_tokens for part in parts),
        }

    def reason_of_gaps(self, batch: Batch) -> str:
        """Why rows were passed over by a job that came to its end; empty where none were."""
        parts = self._prediction(batch).done().values()
        codes = (row.get("code", "") for part in parts for row in part.bad_rows)
        return next(filter(None, codes), "")

    def write_files(
        self, batch: Batch, reason: str
    ) -> tuple[str | None, str | None, dict[str, int]]:
        """The ids of the files of what was answered and of what was not, None where empty; and the
        last counts.

        Args:
            reason: why what was not begun got no answer; empty where all was begun.
        """
        answered: set[int] = set()

        def answers() -> Iterator[bytes]:
            rows = self._prediction(batch).rows()
            for number, found in itertools.groupby(rows, key=line_of):
                if (line := answer_line(batch, list(found))) is not None:
                    answered.add(number)
                    yield _to_line(line)

        output_id = self._add_file(batch, "output", answers())
        error_id = self._add_file(batch, "error", self._failures(batch, answered, reason))
        if not batch.counts:
            return output_id, error_id, {}
        return output_id, error_id, self.counts(batch) | {"completed": len(answered)}

    def clear(self, batch: Batch) -> None:
        """Remove all but the files."""
        self._storage.delete_dir(_place(batch))

    def _failures(self, batch: Batch, answered: set[int], reason: str) -> Iterator[bytes]:
        """Refused requests, bad rows, and what was not begun, in the lines' order."""
        found: dict[int, dict[str, Any]] = {}
        for line in self._stored_lines(batch, "refused.jsonl"):
            found[line.pop(META)["line"]] = line
        for part in self._prediction(batch).done().values():
            for row in part.bad_rows:
                if code := row.get("code"):
                    found[line_of(row)] = unanswered_line(batch, row, code)
                else:
                    found[line_of(row)] = refused_line(batch, row, InputError(row["reason"]))
        if reason:
            for row in self._stored_lines(batch, "input.jsonl"):
                if (number := line_of(row)) not in answered and number not in found:
                    found[number] = unanswered_line(batch, row, reason)
        for _, line in sorted(found.items()):
            yield _to_line(line)

    def _add_file(self, batch: Batch, kind: str, lines: Iterator[bytes]) -> str | None:
        """The file's id, the same whoever writes it; None where there is no line."""
        first = next(lines, None)
        if first is None:
            return None
        digest = hashlib.sha256(f"{batch.id}/{kind}".encode()).hexdigest()
        name = f"{batch.id}_{kind}.jsonl"

        def all_lines() -> Iterator[bytes]:
            yield first
            yield from lines

        file_id = f"file-{digest[:32]}"
        files = self._files
        return files.add(batch.tenant, name, "batch_output", all_lines(), file_id=file_id).id

    def _stored_lines(self, batch: Batch, name: str) -> Iterator[dict[str, Any]]:
        key = _place(batch, name)
        if not self._storage.exists(key):
            return
        for line in self._storage.lines(key, max_bytes=self._options.max_row_bytes):
            yield json.loads(line)

    def _prediction(self, batch: Batch) -> StoredPrediction:
        return StoredPrediction(self._storage, _place(batch, "output"))


def _check_line(number: int, request: LineRequest, batch: Batch, seen: set[str]) -> None:
    if request.model != batch.model:
        raise LineError(
            "mismatched_model",
            f"line {number}: model is not that of the first line, '{batch.model}'",
            "body.model",
        )
    if request.custom_id in seen:
        raise LineError(
            "duplicate_custom_id", f"line {number}: its custom_id was there before", "custom_id"
        )
    seen.add(request.custom_id)


def _too_large(line: int, max_bytes: int) -> dict[str, Any]:
    return batch_error(
        _TOO_MANY,
        f"up to line {line} the requests have more than {max_bytes:,} bytes, each prompt as "
        "often as it is to be answered",
        line,
    )


def batch_error(
    code: str, message: str, line: int | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}


def _place(batch: Batch, name: str = "") -> str:
    """Where the batch's work lies in storage until it has ended."""
    return f"batches/{batch.id}/{name}" if name else f"batches/{batch.id}"


def _to_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
