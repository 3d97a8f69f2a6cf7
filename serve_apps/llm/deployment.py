"""Serves a language model: token ids in, token ids out, after its golden prompts were answered.

Text is the gateway's business. No `__call__`, so Serve's own HTTP port of this application answers
nobody.

    application = build_language_model("sha256:…", DeploymentOptions(max_running=16))
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

from ray import serve

from cluster.errors import MissingToolError
from cluster.grammars import Grammars
from cluster.model_package import ModelPackage
from cluster.model_package.adapter import load_merged
from cluster.model_package.golden_text import check_text_of
from cluster.model_package.language_model import hugging_face_config
from cluster.observability.tracing import open_tracing
from cluster.settings import load_settings
from serve_apps.description import Description
from serve_apps.llm.adapter_loading import open_shelf
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.channels import Channel, OutputChannels, Part
from serve_apps.llm.engine import Engine, EngineRequest, adapter_not_loaded
from serve_apps.llm.golden_prompts import check_answers, golden_requests
from serve_apps.llm.request_router import prefix_routing
from serve_apps.llm.runner import EngineRunner
from serve_apps.llm.shared_base import AdapterOnBase
from serve_apps.llm.traced import traced_steps
from serve_apps.options import DeploymentOptions
from serve_apps.replicas import deploy_with, describe_replica, open_base_of, open_package_of

logger = logging.getLogger(__name__)


class LanguageModel:
    """One replica."""

    def __init__(self, digest: str, options: dict[str, Any]) -> None:
        package = open_package_of(digest)
        parsed = DeploymentOptions.model_validate(options)
        device = _device(parsed)
        self._description = describe_replica(package, parsed, device)
        check_text_of(package)
        # vLLM holds answers to grammars by itself.
        self._grammars = None if parsed.engine == "vllm" else _grammars_of(package)
        engine = _build_engine(package, parsed, device, self._grammars)
        # Also the warm-up: the first request finds memory allocated and kernels loaded.
        precision = engine.stats().precision
        check_answers(package, answer_golden_prompts(engine, package), precision=precision)
        self._tracing = open_tracing(load_settings(), "language-model")
        self._runner = EngineRunner(engine, max_requests=parsed.max_ongoing_requests)
        self._channels = OutputChannels()
        self._adapters = open_shelf(engine, self._runner, package, max_adapters=parsed.max_adapters)

    async def generate(
        self, request: EngineRequest, reader: str = ""
    ) -> AsyncGenerator[Part, None]:
        """Stream a request's tokens, one message per engine step or less.

        Args:
            reader: whose it is; while that listens, all but the last come in its channel.
        """
        if request.sampling.grammar is not None and self._grammars is not None:
            # The engine finds it compiled: it may take longer than other streams can wait.
            await asyncio.to_thread(self._grammars.begin, request.sampling.grammar)
        async with self._holding(request.adapter):
            outputs = self._runner.generate(request)
            if request.traceparent is not None:
                outputs = traced_steps(self._tracing, request, outputs)
            num_tokens = 0
            with self._channels.answering(reader):
                async with aclosing(outputs):
                    async for output in outputs:
                        part = num_tokens, output
                        num_tokens += len(output.token_ids)
                        if not self._channels.tell(reader, part):
                            yield part

    async def listen(self, asked: Channel) -> AsyncGenerator[list[Part], None]:
        """What several answers of one reader consist of, one message per engine step or less."""
        async with aclosing(self._channels.listen(asked)) as messages:
            async for parts in messages:
                yield parts

    async def load_adapter(self, digest: str) -> Description:
        """Have an adapter ready, its golden prompts answered; what the replica itself serves."""
        if self._adapters is None:
            raise adapter_not_loaded(digest)
        async with self._adapters.hold(digest):
            return self._description

    async def describe(self) -> Description:
        """What this replica serves; answered only once it is ready."""
        return self._description

    def _holding(self, adapter: str | None) -> AbstractAsyncContextManager[None]:
        """The engine itself refuses an adapter where there is no shelf."""
        if adapter is None or self._adapters is None:
            return nullcontext()
        return self._adapters.hold(adapter)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises here."""
        if self._runner.failure is not None:
            raise self._runner.failure


def build_language_model(digest: str, options: DeploymentOptions) -> serve.Application:
    """A Serve application for one package."""
    if options.shares_base:
        return deploy_with(AdapterOnBase, "adapter", digest, options)
    return deploy_with(
        LanguageModel,
        "language_model",
        digest,
        options,
        request_router_config=prefix_routing(),
    )


def answer_golden_prompts(engine: Engine, package: ModelPackage) -> list[list[int]]:
    """The engine's greedy continuations of the package's golden prompts."""
    requests = golden_requests(package)
    for request in requests:
        engine.add(request)
    completions: list[list[int]] = [[] for _ in requests]
    num_open = len(requests)
    while num_open:
        for output in engine.step():
            completions[int(output.request_id)].extend(output.token_ids)
            num_open -= output.finish_reason is not None
    return completions


def _device(options: DeploymentOptions) -> str:
    if options.engine == "vllm":
        # Its workers may be processes elsewhere; they say it where they find no GPU.
        return "cuda" if options.num_gpus > 0 else "cpu"

    import torch

    # Only a GPU that was reserved: another replica or a training may hold the others.
    return "cuda" if options.num_gpus > 0 and torch.cuda.is_available() else "cpu"


def _build_engine(
    package: ModelPackage, options: DeploymentOptions, device: str, grammars: Grammars | None
) -> Engine:
    if options.engine == "vllm":
        return _build_vllm(package, options)

    import torch

    torch.set_num_threads(options.num_threads)
    budget = CacheBudget(max_cache_bytes=options.max_cache_bytes, max_running=options.max_running)
    if options.engine != "transformers":
        engine = _build_native(package, options, budget, device, grammars)
        if engine is not None:
            return engine

    from serve_apps.llm.continuous_batching import ContinuousBatchingEngine

    if package.manifest.kind != "adapter":
        return ContinuousBatchingEngine.load(package.model_dir, budget, device, grammars)
    # Added to the base's matrices, it costs nothing per token.
    model = load_merged(open_base_of(package).model_dir, package.model_dir)
    return ContinuousBatchingEngine(model.to(device), budget, grammars)


def _build_native(
    package: ModelPackage,
    options: DeploymentOptions,
    budget: CacheBudget,
    device: str,
    grammars: Grammars | None,
) -> Engine | None:
    """None where it cannot run the model, and another engine may."""
    import torch

    from serve_apps.llm.native.engine import NativeEngine
    from serve_apps.llm.native.model import NativeModel
    from serve_apps.llm.native.shape import why_unreadable
    from serve_apps.llm.native.weights import computed_dtype, read_tensors

    is_adapter = package.manifest.kind == "adapter"
    base_dir = (open_base_of(package) if is_adapter else package).model_dir
    config: Any = hugging_face_config(base_dir)
    reason = why_unreadable(config)
    if reason is not None and options.engine == "auto" and options.weights is None:
        logger.info("engine 'transformers' instead of 'native': %s", reason)
        return None
    tensors = read_tensors(base_dir)
    dtype = computed_dtype(tensors) if options.dtype == "auto" else getattr(torch, options.dtype)
    if is_adapter and reason is None:
        # Added to the base's matrices, it costs nothing per token; the sum is in 32 bits.
        merged = load_merged(base_dir, package.model_dir)
        config, tensors = merged.config, dict(merged.state_dict())
    is_int8 = options.weights == "int8"
    model = NativeModel(config, tensors, budget, dtype=dtype, device=device, is_int8=is_int8)
    return NativeEngine(model, budget, grammars)


def _grammars_of(package: ModelPackage) -> Grammars:
    info = package.manifest.language_model
    assert info is not None, "a verified package of a language model describes it"
    return Grammars.load(
        package.model_dir, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids
    )


def _build_vllm(package: ModelPackage, options: DeploymentOptions) -> Engine:
    try:
        from serve_apps.llm.vllm import VllmEngine
    except ModuleNotFoundError:
        raise MissingToolError(
            "engine 'vllm' is not installed on this machine",
            hint="install the extra `vllm` there, or deploy with engine: auto",
        ) from None

    is_adapter = package.manifest.kind == "adapter"
    return VllmEngine.load(
        (open_base_of(package) if is_adapter else package).model_dir,
        options.vllm_arguments,
        dtype=options.dtype,
        max_cache_bytes=options.max_cache_bytes,
        max_running=options.max_running,
        adapter_dir=package.model_dir if is_adapter else None,
    )
