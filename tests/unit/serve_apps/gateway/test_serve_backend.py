"""A stream is left behind where its replica has to go, and a replica that failed is noted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cluster.errors import ReplicaLeavingError, UpstreamFailedError
from serve_apps.gateway import serve_backend
from serve_apps.gateway.serve_backend import ServeBackend
from serve_apps.llm.channels import Part
from serve_apps.llm.engine import EngineRequest, FinishReason, Sampling, TokenOutput
from serve_apps.llm.placements import Placements

APPLICATION = "talker.v1"
REQUEST = EngineRequest("r", (1, 2), Sampling(max_tokens=4))


class OneReplica:
    """Handles to an application whose replica `a` takes every request."""

    def __init__(self, placements: Placements, *, fails_after: int = 100) -> None:
        self._placements = placements
        self._fails_after = fails_after
        self.is_closed = False

    async def stream(
        self, application: str, method: str, request: EngineRequest, _reader: str
    ) -> AsyncGenerator[Part, None]:
        assert (application, method) == (APPLICATION, "generate")
        self._placements.placed(request.request_id, application, "a")
        try:
            for number in range(request.sampling.max_tokens):
                if number == self._fails_after:
                    raise UpstreamFailedError("the replica died")
                is_last = number == request.sampling.max_tokens - 1
                reason: FinishReason | None = "length" if is_last else None
                yield number, TokenOutput(request.request_id, (number,), reason)
                await asyncio.sleep(0.01)
        finally:
            self.is_closed = True


@pytest.fixture
def placements(monkeypatch: pytest.MonkeyPatch) -> Placements:
    placements = Placements()
    monkeypatch.setattr(serve_backend, "PLACEMENTS", placements)
    return placements


def backend_over(handles: OneReplica) -> ServeBackend:
    backend = ServeBackend()
    backend._handles = handles  # type: ignore[assignment]
    return backend


@pytest.mark.parametrize(
    ("leaves_after", "drain_s", "moves"),
    [(0, 0, True), (2, 0, True), (3, 0, False), (0, 60, False)],
)
async def test_a_stream_leaves_a_replica_that_has_to_go_unless_it_ends_in_its_time(
    placements: Placements, leaves_after: int, drain_s: float, moves: bool
) -> None:
    handles, given = OneReplica(placements), list[int]()

    async def read() -> None:
        async for output in backend_over(handles).generate(APPLICATION, REQUEST, drain_s=drain_s):
            given.extend(output.token_ids)
            if len(given) == leaves_after + 1:
                placements.replicas_are(APPLICATION, {"b"})

    if moves:
        with pytest.raises(ReplicaLeavingError, match=r"replica a of .* has to go"):
            await read()
    else:
        await read()
    assert given == list(range(leaves_after + 1 if moves else 4))
    assert handles.is_closed
    assert not placements.is_suspect(APPLICATION, "a")


async def test_a_replica_that_fails_under_a_stream_is_suspect(placements: Placements) -> None:
    backend = backend_over(OneReplica(placements, fails_after=1))
    outputs = backend.generate(APPLICATION, REQUEST, drain_s=60)
    assert (await anext(outputs)).token_ids == (0,)
    with pytest.raises(UpstreamFailedError):
        await anext(outputs)
    assert placements.is_suspect(APPLICATION, "a")
