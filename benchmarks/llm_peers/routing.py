"""Where prompts go that begin alike: by prefix, or as Ray Serve sends them, power of two choices.

Two replicas of the same package each, called through handles from one process, without a gateway.
A replica's cache holds the beginnings of about half of the conversations: what comes back to the
replica that answered it before is found there, and what goes anywhere is mostly not.

    row = compare_routing(model_dir, FULL, rounds=5)
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.llm_peers.completions_load import Load
from benchmarks.llm_peers.figures import StreamTimes, closed_loop
from benchmarks.llm_peers.model import FIRST_PAIR, VOCAB_SIZE, Shape
from benchmarks.measure import Row, row_of

_NUM_CONVERSATIONS = 16
_SHARED_TOKENS = 512
_PROMPT_TOKENS = 640
_NEW_TOKENS = 8
_CACHE_TOKENS = 7000
_ANSWERS = 3 * _NUM_CONVERSATIONS


def compare_routing(model_dir: Path, shape: Shape, rounds: int) -> Row:
    head_size = shape.hidden_size // shape.num_attention_heads
    token_bytes = 4 * shape.num_hidden_layers * shape.num_key_value_heads * head_size
    with tempfile.TemporaryDirectory(prefix="hst") as home:
        found = subprocess.run(
            [sys.executable, "-m", __name__, model_dir, str(_CACHE_TOKENS * token_bytes),
             str(rounds)],
            env={**os.environ, "HELIOSTAT_HOME": home},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )  # fmt: skip
    return row_of(
        f"seconds to the first token, p50, {_SHARED_TOKENS} of {_PROMPT_TOKENS} prompt tokens "
        "shared, two replicas",
        pairs=json.loads(found.stdout.strip().splitlines()[-1]),
        peer_name="the same, power of two choices",
        at_most=0.5,
        note=f"{_NUM_CONVERSATIONS} conversations in turn; a replica's cache holds about half of "
        "their beginnings",
    )


def _publish(model_dir: Path) -> str:
    from cluster.model_package import LocalSigner, ensure_local_key, write_package
    from cluster.settings import load_settings
    from cluster.storage import Storage

    settings = load_settings()
    ensure_local_key(settings.keys_dir)
    package = write_package(
        model_dir,
        name="model",
        kind="language_model",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    )
    return package.digest


def _serve(digest: str, max_cache_bytes: int) -> dict[str, Any]:
    """Handles to both, by name."""
    import ray
    from ray import serve

    from serve_apps.llm.deployment import LanguageModel
    from serve_apps.llm.request_router import prefix_routing
    from serve_apps.options import DeploymentOptions
    from serve_apps.replicas import deploy_with

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    options = DeploymentOptions(num_replicas=2, max_cache_bytes=max_cache_bytes)
    ways: dict[str, dict[str, Any]] = {
        "prefix": {"request_router_config": prefix_routing()},
        "power_of_two": {},
    }
    return {
        name: serve.run(
            deploy_with(LanguageModel, name, digest, options, **more), name=name, route_prefix=None
        )
        for name, more in ways.items()
    }


async def _ttft_s(handle: Any, seed: int) -> float:
    """The median of a round."""
    from serve_apps.llm.engine import EngineRequest, Sampling

    load = Load(
        url="", model="", num_streams=2, num_answers=_ANSWERS, prompt_tokens=_PROMPT_TOKENS,
        new_tokens=_NEW_TOKENS, first_id=FIRST_PAIR, last_id=VOCAB_SIZE - 1, seed=seed,
        num_shared_tokens=_SHARED_TOKENS, num_beginnings=_NUM_CONVERSATIONS,
    )  # fmt: skip
    sampling = Sampling(max_tokens=_NEW_TOKENS, temperature=0)
    prompts = [tuple(load.prompt(number)) for number in range(_ANSWERS)]

    async def stream(number: int) -> StreamTimes:
        request = EngineRequest(f"{seed}-{number}", prompts[number], sampling)
        began_s, first_s = time.perf_counter(), 0.0
        async for _ in handle.options(stream=True).generate.remote(request):
            first_s = first_s or time.perf_counter()
        return StreamTimes(began_s, first_s, time.perf_counter(), _NEW_TOKENS)

    return (await closed_loop(load.num_streams, _ANSWERS, stream)).ttft_p50_s


async def _measure(handles: dict[str, Any], rounds: int) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for index in range(rounds + 1):
        names = list(handles) if index % 2 == 0 else list(reversed(handles))
        found = {name: await _ttft_s(handles[name], index) for name in names}
        if index:  # the first round fills the caches
            pairs.append((found["prefix"], found["power_of_two"]))
    return pairs


def main(model_dir: Path, max_cache_bytes: int, rounds: int) -> None:
    handles = _serve(_publish(model_dir), max_cache_bytes)
    print(json.dumps(asyncio.run(_measure(handles, rounds))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
