"""Watches what each version is asked and answers, against the profile in its package.

A request only leaves its arrays here, a uniform sample of a bounded number and size; counting,
figures and SQL are done by `flush`, off the event loop. Requests that are mirrored to a version do
not come here. Versions whose package has no profile cost one look-up.

    watch = DriftWatch(instruments, DriftStore(database).write)
    watch.count(model, arrays, outputs)
    watch.flush()                           # in a thread, every few seconds
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.processing import Array
from cluster.statistics.drift import SIDES, DriftWindow, Side, WindowCounts, measure
from cluster.statistics.features import TOKENS, input_features, output_features, text_features
from cluster.statistics.profile import read_profile
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.releases.comparison import is_finite
from serve_apps.gateway.routing_table import Routes
from serve_apps.gateway.telemetry.instruments import Instruments, ModelLabel
from serve_apps.llm.engine import EngineRequest, TokenOutput

HALF_LIFE_ROWS = 5_000.0
"""Newer rows after which a row counts half."""
_MIN_SHOWN_ROWS = 200
"""Fewer rows say nothing of a distribution."""
_MAX_CALLS = 256
"""Requests that are kept of each version between two flushes."""
_MAX_ROWS = 64
"""Of one request."""
_MAX_BYTES = 32 * 1024**2

Write = Callable[[str, str, int, WindowCounts], None]
"""Records under a source, a name and a version what a window holds."""


@dataclass(frozen=True)
class _Call:
    """One request's arrays; of text, its token ids by side."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.inputs.values(), *self.outputs.values()))


class _Sample:
    """A uniform sample of the requests since the last flush."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._num_offered = 0
        self._num_bytes = 0

    def offer(self, call: _Call) -> None:
        self._num_offered += 1
        place = len(self.calls)
        if place >= _MAX_CALLS:
            place = random.randrange(self._num_offered)  # noqa: S311 - nothing secret
            if place >= _MAX_CALLS:
                return
        replaced = self.calls[place].num_bytes if place < len(self.calls) else 0
        if self._num_bytes - replaced + call.num_bytes > _MAX_BYTES:
            return
        self._num_bytes += call.num_bytes - replaced
        self.calls[place : place + 1] = [call]


@dataclass
class _Watched:
    """A version with a profile."""

    model: ServedModel
    window: DriftWindow
    sample: _Sample = field(default_factory=_Sample)


class DriftWatch:
    """The versions of one gateway replica."""

    def __init__(self, instruments: Instruments, write: Write | None = None) -> None:
        self._instruments = instruments
        self._write = write
        self._source = uuid.uuid4().hex
        self._watched: dict[tuple[str, int], _Watched | None] = {}

    def count(self, model: ServedModel, inputs: Arrays, outputs: Arrays) -> None:
        """A graph took these inputs, and a client got these outputs."""
        watched = self._find(model)
        if watched is not None:
            watched.sample.offer(_Call(_first_rows(inputs), _first_rows(outputs)))

    def stream(
        self,
        model: ServedModel,
        request: EngineRequest,
        outputs: AsyncGenerator[TokenOutput, None],
    ) -> AsyncGenerator[TokenOutput, None]:
        """The same tokens, counted once they have come."""
        watched = self._find(model)
        return outputs if watched is None else _counted(watched, request, outputs)

    def follow(self, routes: Routes) -> None:
        """Forget the versions that are no longer served."""
        for gone in set(self._watched) - set(routes.served):
            del self._watched[gone]

    def flush(self) -> None:
        """Count what has come since the last time, show it and record it."""
        for (name, version), watched in list(self._watched.items()):
            if watched is None:
                continue
            sample, watched.sample = watched.sample, _Sample()
            if not sample.calls:
                continue
            _add(watched, sample.calls)
            counts = watched.window.counts
            self._show(ModelLabel(name, str(version)), watched, counts)
            if self._write is not None:
                self._write(self._source, name, version, counts)

    def _find(self, model: ServedModel) -> _Watched | None:
        key = (model.served.name, model.served.version)
        if key not in self._watched:
            profile = read_profile(model.manifest.profile)
            self._watched[key] = (
                _Watched(model, DriftWindow(profile, half_life_rows=HALF_LIFE_ROWS))
                if profile is not None
                else None
            )
        return self._watched[key]

    def _show(self, label: ModelLabel, watched: _Watched, counts: WindowCounts) -> None:
        instruments = self._instruments
        # So that its metrics end with the version.
        instruments.version(label)
        drift = measure(watched.window.profile, counts)
        for side in SIDES:
            instruments.drift_rows.labels(*label, side).set(counts.rows[side])
            if counts.rows[side] < _MIN_SHOWN_ROWS:
                continue
            for feature, found in drift[side].items():
                instruments.drift_psi.labels(*label, side, feature).set(found.psi)
                if found.ks is not None:
                    instruments.drift_ks.labels(*label, side, feature).set(found.ks)


async def _counted(
    watched: _Watched, request: EngineRequest, outputs: AsyncGenerator[TokenOutput, None]
) -> AsyncGenerator[TokenOutput, None]:
    """What a client leaves is counted as far as it came; what fails is not."""
    answer: list[int] = []
    has_failed = False
    try:
        async for output in outputs:
            answer += output.token_ids
            yield output
    except Exception:
        has_failed = True
        raise
    finally:
        await outputs.aclose()
        if not has_failed:
            watched.sample.offer(
                _Call({TOKENS: np.array(request.prompt_ids)}, {TOKENS: np.array(answer, dtype=int)})
            )


def _add(watched: _Watched, calls: list[_Call]) -> None:
    if watched.model.manifest.kind == "graph":
        names = watched.model.manifest.profile.get("feature_names")
        feature_names = names if isinstance(names, list) else []
        taken = _joined(call.inputs for call in calls)
        # What is no number is an error, and no answer to compare with others.
        given = _joined(call.outputs for call in calls if is_finite(call.outputs))
        values = input_features(taken, [str(name) for name in feature_names])
        watched.window.add("inputs", values, num_rows=_num_rows(taken))
        watched.window.add("outputs", output_features(given), num_rows=_num_rows(given))
        return
    sides: dict[Side, list[Array]] = {
        "inputs": [call.inputs[TOKENS] for call in calls],
        "outputs": [call.outputs[TOKENS] for call in calls],
    }
    for side, ids in sides.items():
        watched.window.add(side, text_features(ids), num_rows=len(ids))


def _joined(calls: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The rows of several requests; without those that are not shaped like the first's."""
    parts: dict[str, list[Array]] = {}
    for arrays in calls:
        for name, array in arrays.items():
            found = parts.setdefault(name, [])
            if not found or found[0].shape[1:] == array.shape[1:]:
                found.append(array)
    return {name: np.concatenate(found) for name, found in parts.items()}


def _num_rows(arrays: Mapping[str, Array]) -> int:
    return max(map(len, arrays.values()), default=0)


def _first_rows(arrays: Arrays) -> dict[str, Array]:
    """A request's first rows, without keeping the others alive."""
    return {
        name: array if len(array) <= _MAX_ROWS else array[:_MAX_ROWS].copy()
        for name, array in arrays.items()
        if array.ndim
    }
