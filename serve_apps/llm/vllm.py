"""vLLM as an Engine, for GPUs; the extra `vllm` installs it, and this module alone imports it.

Scheduling, cache, kernels and sampling are vLLM's. Its asynchronous engine runs in an event loop
of its own thread; its HTTP server, which has routes without a key, is never started.

    engine = VllmEngine.load(package.path / "model", VllmArguments(tensor_parallel_size=2))
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import queue
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from vllm.config import StructuredOutputsConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from cluster.errors import InputError, PackageError, UpstreamFailedError
from cluster.generation import Grammar
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    Sampling,
    StepOutput,
    TokenOutput,
    check_adapter,
    check_request,
)
from serve_apps.llm.vllm_answers import Answer
from serve_apps.vllm_arguments import VllmArguments

_IDLE_WAIT_S = 0.1
_STOP_TIMEOUT_S = 5.0
_OWN_ADAPTER = "the adapter that was deployed"
_LARGEST_SEED = 2**63 - 1

ResultType = TypeVar("ResultType")


class VllmEngine:
    """An Engine over vLLM's AsyncLLM."""

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        self._adapters: dict[str, LoRARequest] = {}
        self._lora_ids = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        self._steps: queue.SimpleQueue[list[tuple[Answer, TokenOutput]]] = queue.SimpleQueue()
        self._unsent: list[tuple[Answer, TokenOutput]] = []
        """What came since the last hand-over; touched by the loop alone."""
        self._failure: UpstreamFailedError | None = None
        try:
            self._llm: AsyncLLM = self._in_loop(_start(arguments)).result()
        except BaseException:
            self._stop_loop()
            raise
        config = self._llm.vllm_config
        self._max_context_tokens = int(config.model_config.max_model_len)
        self._vocab_size = int(config.model_config.get_vocab_size())
        self._precision = str(config.model_config.dtype).removeprefix("torch.")
        has_tokenizer = not config.model_config.skip_tokenizer_init
        tokenizer = self._llm.get_tokenizer() if has_tokenizer else None
        self._grammar_end: int | None = getattr(tokenizer, "eos_token_id", None)
        """The one token that ends a text to vLLM's grammars; without it there can be none."""
        self._noise_is_by_position = bool(config.use_v2_model_runner)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        arguments: VllmArguments,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        max_cache_bytes: int = 512 * 1024**2,
        max_running: int = 32,
        adapter_dir: Path | None = None,
    ) -> VllmEngine:
        """Read a *verified* Hugging Face directory.

        Args:
            adapter_dir: a verified peft directory; every answer is this adapter's.

        Raises:
            PackageError: vLLM cannot serve this model, or not with these arguments.
        """
        wanted = _engine_arguments(model_dir, arguments, max_cache_bytes, max_running)
        wanted.dtype = dtype
        if adapter_dir is not None:
            wanted.enable_lora = True
            wanted.max_lora_rank = _lora_rank(adapter_dir)
        try:
            engine = cls(wanted)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise PackageError(
                f"vLLM cannot serve this model: {_first_line(error)}",
                hint="see the replica's log, change engine_arguments or choose another engine",
            ) from None
        if adapter_dir is not None:
            engine.load_adapter(_OWN_ADAPTER, adapter_dir)
        return engine

    def load_adapter(self, digest: str, model_dir: Path) -> None:
        if self._llm.vllm_config.lora_config is None:
            raise PackageError(
                "this engine was started without room for adapters",
                hint="set engine_arguments.max_loras of the base",
            )
        adapter = LoRARequest(digest, next(self._lora_ids), str(model_dir))
        try:
            self._in_loop(self._llm.add_lora(adapter)).result()
        except Exception as error:
            raise PackageError(f"vLLM cannot use this adapter: {_first_line(error)}") from None
        with self._lock:
            self._adapters[digest] = adapter

    def unload_adapter(self, digest: str) -> None:
        with self._lock:
            adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._in_loop(self._llm.remove_lora(adapter.lora_int_id)).result()

    def add(self, request: EngineRequest) -> None:
        check_request(
            request, max_context_tokens=self._max_context_tokens, vocab_size=self._vocab_size
        )
        check_adapter(request, self._adapters)
        answer = Answer(request, self._repeats(request))
        sampling = self._with_end_of_grammar(request.sampling)
        parameters = to_sampling_params(sampling, num_said=answer.num_given)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._answers[request.request_id] = answer
            answer.work = self._in_loop(self._generate(answer, parameters))

    def step(self) -> StepOutput:
        try:
            found = self._steps.get(timeout=_IDLE_WAIT_S)
        except queue.Empty:
            if self._failure is None and self._llm.errored:
                self._failure = UpstreamFailedError("the engine stopped: vLLM's process ended")
            found = []
        if not found and self._failure is not None:
            raise self._failure
        with self._lock:
            return [output for answer, output in found if self._is_awaited(answer, output)]

    def abort(self, request_id: str) -> None:
        with self._lock:
            answer = self._answers.pop(request_id, None)
        if answer is not None and answer.work is not None:
            answer.work.cancel()

    def stats(self) -> EngineStats:
        with self._lock:
            running = sum(answer.has_begun for answer in self._answers.values())
            in_flight = len(self._answers)
        return EngineStats(
            num_running=running,
            num_waiting=in_flight - running,
            max_context_tokens=self._max_context_tokens,
            vocab_size=self._vocab_size,
            precision=self._precision,
        )

    def close(self) -> None:
        with self._lock:
            if self._failure is not None and not self._thread.is_alive():
                return
            self._failure = UpstreamFailedError("the engine stopped: it was closed")
        self._in_loop(self._shut_down()).result()
        self._stop_loop()

    def _with_end_of_grammar(self, sampling: Sampling) -> Sampling:
        """After that token nothing holds an answer to its grammar any more."""
        grammar = sampling.grammar
        if grammar is None:
            return sampling
        if self._grammar_end is None:
            raise InputError("this engine cannot hold an answer to a grammar", param=grammar.kind)
        ends = (*sampling.eos_token_ids, self._grammar_end)
        return dataclasses.replace(sampling, eos_token_ids=ends)

    def _repeats(self, request: EngineRequest) -> bool:
        """Whether an answer begun elsewhere is generated from its first token again.

        To vLLM what is there already is prompt, which is the same thing unless the answer's own
        tokens count for more, or noise is drawn in order instead of by position.
        """
        sampling = request.sampling
        if not request.answer_ids:
            return False
        counts_tokens = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.grammar
        )
        if sampling.is_greedy:
            return counts_tokens
        if sampling.seed is None and counts_tokens:
            raise InputError(
                "an answer with a penalty or a grammar goes on only by its seed", param="seed"
            )
        return sampling.seed is not None and (counts_tokens or not self._noise_is_by_position)

    async def _generate(self, answer: Answer, parameters: SamplingParams) -> None:
        request = answer.request
        prompt = [*request.prompt_ids, *answer.given]
        # vLLM makes the id unique among those it still works on.
        outputs = self._llm.generate(
            # Tenants share no cache: the time of an answer would tell one what another asked.
            tokens_input(prompt, cache_salt=request.tenant or None),
            parameters,
            request.request_id,
            lora_request=self._adapters.get(request.adapter or _OWN_ADAPTER),
        )
        try:
            async with contextlib.aclosing(outputs):
                async for found in outputs:
                    output = answer.take(found.outputs[0])
                    if output.token_ids or output.finish_reason is not None:
                        self._hand_over(answer, output)
        except EngineDeadError as error:
            self._failure = UpstreamFailedError(f"the engine stopped: {error}")
            self._steps.put([])
        except VLLMClientError as error:
            refused = TokenOutput(request.request_id, (), "refused", str(error))
            self._hand_over(answer, refused)
        except Exception as error:
            shown = str(error.__cause__ or error) or type(error).__name__
            failed = TokenOutput(request.request_id, (), "error", shown)
            self._hand_over(answer, failed)

    def _hand_over(self, answer: Answer, output: TokenOutput) -> None:
        """Keep what one step of vLLM gave together: all of it is in the loop's queue already."""
        self._unsent.append((answer, output))
        if len(self._unsent) == 1:
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        self._steps.put(unsent)

    def _is_awaited(self, answer: Answer, output: TokenOutput) -> bool:
        if self._answers.get(output.request_id) is not answer:
            return False  # it was aborted, and its id may be another's by now
        answer.has_begun = True
        if output.finish_reason is not None:
            del self._answers[output.request_id]
        return True

    def _in_loop(self, work: Coroutine[Any, Any, ResultType]) -> Future[ResultType]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut_down(self) -> None:
        for answer in self._answers.values():
            if answer.work is not None:
                answer.work.cancel()
        self._answers.clear()
        self._llm.shutdown(timeout=_STOP_TIMEOUT_S)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)


def to_sampling_params(sampling: Sampling, *, num_said: int = 0) -> SamplingParams:
    """Our sampling in vLLM's words, `num_said` tokens of the answer being there already.

    Raises:
        InputError: naming the field that vLLM has no equal for.
    """
    if sampling.logit_bias and sampling.repetition_penalty != 1:
        raise InputError(
            "this engine has no logit_bias beside a repetition_penalty, which would scale it",
            hint="leave one of them out",
            param="logit_bias",
        )
    try:
        return SamplingParams(
            max_tokens=sampling.max_tokens - num_said,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=sampling.num_logprobs,
            # To vLLM -1 is no seed.
            seed=None if sampling.seed is None else sampling.seed & _LARGEST_SEED,
            structured_outputs=_structure(sampling.grammar),
            # These are the package's; those that the model's own files name do not count.
            stop_token_ids=list(sampling.eos_token_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except ValueError as error:
        message = str(error)
        field = getattr(error, "parameter", None) or message.split(maxsplit=1)[0]
        raise InputError(f"this engine refuses it: {message}", param=field) from None


def _structure(grammar: Grammar | None) -> StructuredOutputsParams | None:
    if grammar is None:
        return None
    if grammar.kind == "regex":
        return StructuredOutputsParams(regex=grammar.source)
    return StructuredOutputsParams(json=grammar.source)


def _engine_arguments(
    model_dir: Path, arguments: VllmArguments, max_cache_bytes: int, max_running: int
) -> AsyncEngineArgs:
    given = arguments.model_dump(exclude_none=True)
    if arguments.max_loras == 0:
        del given["max_loras"], given["max_lora_rank"]
    else:
        given["enable_lora"] = True
    if arguments.gpu_memory_utilization is None:
        given["kv_cache_memory_bytes"] = max_cache_bytes // arguments.tensor_parallel_size
    if arguments.tensor_parallel_size > 1:
        # In the placement group that the replica was started in.
        given["distributed_executor_backend"] = "ray"
    return AsyncEngineArgs(
        model=str(model_dir),
        # Grammars need one; nothing else does.
        skip_tokenizer_init=not (model_dir / "tokenizer.json").is_file(),
        trust_remote_code=False,
        load_format="safetensors",
        generation_config="vllm",
        # The library that our own engines, and the gateway's check, hold grammars to. Left to
        # itself vLLM takes what suits the first request for all that follow.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        max_num_seqs=max_running,
        max_logprobs=-1,
        disable_log_stats=True,
        **given,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def _lora_rank(adapter_dir: Path) -> Any:
    """The least of the ranks that vLLM has kernels for."""
    rank = int(json.loads((adapter_dir / "adapter_config.json").read_bytes())["r"])
    return min(allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank)


async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
    # In the loop, so that its tasks belong there.
    return AsyncLLM.from_engine_args(arguments)
