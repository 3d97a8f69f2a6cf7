"""What `heliostat up` says where a part does not start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.errors import StartError
from cluster.session import serving
from cluster.session.processes import RAY, end_stack, start
from cluster.session.up import _Start
from cluster.settings import Settings


@pytest.mark.parametrize("lives", [False, True])
def test_where_ray_ended_under_the_gateway_its_own_words_are_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """On a busy machine `ray start` gives up half a minute after its dashboard answers."""

    def refuse(_settings: Settings) -> None:
        raise StartError("Ray Serve did not take the applications: Connection refused")

    monkeypatch.setattr(serving, "deploy", refuse)
    ends = "import time; time.sleep(60)" if lives else "raise TimeoutError('the node was too slow')"
    begun = _Start(Settings(home=tmp_path), print)
    head = start(
        [sys.executable, "-c", ends],
        stack=tmp_path,
        part=RAY,
        environment=dict(os.environ),
        log_path=tmp_path / "ray.log",
    )
    begun._record = begun._record.with_part(RAY, head)
    try:
        if not lives:
            os.waitpid(head.pid, 0)
        words = "did not take" if lives else "Ray head ended: TimeoutError: the node was too slow"
        with pytest.raises(StartError, match=words):
            begun._start_serving([])
    finally:
        end_stack(tmp_path, RAY, [head])
