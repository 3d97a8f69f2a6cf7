"""How a replica takes an adapter beside its model: verified, fitted, and its golden prompts
answered.

    shelf = open_shelf(engine, runner, base, max_adapters=8)
"""

from __future__ import annotations

import asyncio

from cluster.errors import InputError
from cluster.model_package import ModelPackage, open_digest
from cluster.settings import load_settings
from serve_apps.llm.adapters import AdapterShelf
from serve_apps.llm.engine import AdapterLoader, Engine
from serve_apps.llm.golden_prompts import check_answers, golden_requests
from serve_apps.llm.runner import EngineRunner


def open_shelf(
    engine: Engine, runner: EngineRunner, base: ModelPackage, *, max_adapters: int
) -> AdapterShelf | None:
    """Where adapters of `base` are kept; None where the engine takes none."""
    if not isinstance(engine, AdapterLoader) or not max_adapters:
        return None
    loader = engine

    async def load(digest: str) -> None:
        adapter = await asyncio.to_thread(_open_adapter, digest, base)
        await asyncio.to_thread(loader.load_adapter, digest, adapter.model_dir)
        completions = []
        # One after the other: where one fails, none is left in the engine.
        for request in golden_requests(adapter, prefix=f"golden/{digest}/", adapter=digest):
            outputs = [output async for output in runner.generate(request)]
            completions.append([token for output in outputs for token in output.token_ids])
        check_answers(adapter, completions, precision=engine.stats().precision)

    async def unload(digest: str) -> None:
        # An engine in another process takes its time over it.
        await asyncio.to_thread(loader.unload_adapter, digest)

    return AdapterShelf(load, unload, max_adapters=max_adapters)


def _open_adapter(digest: str, base: ModelPackage) -> ModelPackage:
    """The verified package, if it is one of this base's adapters."""
    package = open_digest(digest, load_settings())
    info = package.manifest.adapter
    if info is None or info.base_digest != base.digest:
        raise InputError(
            f"package {digest} is no adapter of {base.digest}, which is served here", param="model"
        )
    return package
