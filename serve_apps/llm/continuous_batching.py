"""The engine that runs on `transformers`' own continuous batching, on CPU or GPU.

Paged cache, chunked prefill and scheduling are theirs. Sampling is ours: their loop takes the
argmax, and a logits processor turns each request's sampling into an argmax (see
cluster/sampling.py), so that every request has its own parameters and seed.

    engine = ContinuousBatchingEngine.load(package.path / "model", EngineOptions())
"""

from __future__ import annotations

import queue
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.logits_process import LogitsProcessorList

from cluster.errors import PackageError, UpstreamFailedError
from cluster.logits import adjust, describe_choice
from cluster.model_package.language_model import hugging_face_config
from cluster.sampling import perturb
from serve_apps.llm.budget import CacheBudget as CacheBudget
from serve_apps.llm.engine import (
    EngineRequest,
    EngineStats,
    FinishReason,
    Sampling,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
    check_request,
)

_IDLE_WAIT_S = 0.1
_PAGE_TOKENS = 32
_DEFAULT_CONTEXT_TOKENS = 2048
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Drawn:
    """A request's sampling with its seed settled, and what was said of its tokens."""

    sampling: Sampling
    seed: int
    num_prompt: int
    """Tokens of the prompt proper: an answer that goes on begins among the initial ones."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By position among the request's tokens, the prompt's included."""

    def __deepcopy__(self, _memo: object) -> _Drawn:
        # transformers copies it when it puts a request back: it stays the request's own.
        return self


@dataclass
class _Progress:
    """A request in flight."""

    request: EngineRequest
    drawn: _Drawn
    num_emitted: int = 0
    """How many of its tokens have been handed out."""

    def take_logprobs(self, num_tokens: int) -> tuple[TokenLogprobs, ...]:
        """What was said of the next tokens; nothing where nobody asked."""
        if self.drawn.sampling.num_logprobs is None:
            return ()
        first = self.request.num_given_tokens + self.num_emitted
        return tuple(self.drawn.logprobs.pop(first + i) for i in range(num_tokens))


class ContinuousBatchingEngine:
    """An Engine over `model.init_continuous_batching`."""

    def __init__(self, model: Any, budget: CacheBudget | None = None) -> None:
        budget = budget or CacheBudget()
        config = model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        num_blocks = _num_blocks(config, model.dtype, budget)
        self._max_context_tokens = min(_context_tokens(config), num_blocks * _PAGE_TOKENS)
        self._steps: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._progress: dict[str, _Progress] = {}
        self._manager = _start_manager(model, budget, num_blocks, self._steps)

    @classmethod
    def load(
        cls, model_dir: Path, budget: CacheBudget | None = None, device: str = "cpu"
    ) -> ContinuousBatchingEngine:
        """Read a *verified* Hugging Face directory, weights (quantised ones too) as 32-bit floats.

        Raises:
            PackageError: transformers cannot build this model.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(
                model_dir,
                config=hugging_face_config(model_dir),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise PackageError(
                f"transformers cannot load this model: {first_line}",
                hint="check that it loads with AutoModelForCausalLM.from_pretrained",
            ) from None
        return cls(model.to(device).eval(), budget)

    def add(self, request: EngineRequest) -> None:
        check_request(
            request, max_context_tokens=self._max_context_tokens, vocab_size=self._vocab_size
        )
        seed = request.sampling.seed
        seed = secrets.randbits(62) if seed is None else seed
        drawn = _Drawn(request.sampling, seed, len(request.prompt_ids))
        with self._lock:
            self._progress[request.request_id] = _Progress(request, drawn)
        accepted = self._manager.add_request(
            [*request.prompt_ids, *request.answer_ids],
            request_id=request.request_id,
            max_new_tokens=request.sampling.max_tokens - len(request.answer_ids),
            eos_token_id=list(request.sampling.eos_token_ids),
            streaming=True,
            drawn=drawn,
        )
        if accepted is None:
            self.abort(request.request_id)
            raise self._failure()

    def step(self) -> StepOutput:
        try:
            outputs = self._steps.get(timeout=_IDLE_WAIT_S)
        except queue.Empty:
            if not self._manager.is_running():
                raise self._failure() from None
            return ()
        with self._lock:
            return [token_output for output in outputs if (token_output := self._take(output))]

    def abort(self, request_id: str) -> None:
        with self._lock:
            known = self._progress.pop(request_id, None)
        if known is not None:
            self._manager.cancel_request(request_id)

    def stats(self) -> EngineStats:
        processor = self._manager.batch_processor
        running = len(processor.scheduler.active_requests) if processor is not None else 0
        with self._lock:
            in_flight = len(self._progress)
        return EngineStats(
            num_running=min(running, in_flight),
            num_waiting=max(0, in_flight - running),
            max_context_tokens=self._max_context_tokens,
            vocab_size=self._vocab_size,
        )

    def close(self) -> None:
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=_STOP_TIMEOUT_S, hard_stop=True)

    def _take(self, output: Any) -> TokenOutput | None:
        """The part of a request's progress that has not been handed out; None after an abort."""
        known = self._progress.get(output.request_id)
        if known is None:
            return None
        tokens = tuple(int(token) for token in output.generated_tokens[known.num_emitted :])
        logprobs = known.take_logprobs(len(tokens))
        known.num_emitted += len(tokens)
        if not output.is_finished():
            return TokenOutput(output.request_id, tokens, logprobs=logprobs)
        del self._progress[output.request_id]
        if output.status == RequestStatus.FAILED:
            return TokenOutput(output.request_id, tokens, "error", str(output.error), logprobs)
        ended = bool(tokens) and tokens[-1] in known.request.sampling.eos_token_ids
        reason: FinishReason = "stop" if ended else "length"
        return TokenOutput(output.request_id, tokens, reason, logprobs=logprobs)

    def _failure(self) -> UpstreamFailedError:
        cause = self._manager.background_thread_status.fatal_error
        return UpstreamFailedError(f"the engine stopped: {cause or 'it was closed'}")


class _StepRouter(OutputRouter):  # type: ignore[misc]
    """Keeps the outputs of one step together, where theirs delivers them one by one."""

    def __init__(self, steps: queue.SimpleQueue[list[Any]]) -> None:
        super().__init__()
        self._steps = steps

    def deliver(self, output: Any) -> None:
        self._steps.put([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._steps.put(list(outputs))


class _PerRequestSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Makes the loop's argmax choose what each request's sampling would."""

    def __init__(self) -> None:
        self.supported_kwargs = {"drawn": _Drawn}
        self.ignored_kwargs: tuple[str, ...] = ()
        self._rows: list[tuple[_Drawn, Any]] = []
        """Sampling and transformers' own state of each request that gets a token."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        # Called just before the forward pass of the same batch, in the same thread.
        self._rows = [
            (request.state.logit_processor_kwargs["drawn"], request.state)
            for request in requests_with_new_token
        ]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        for row, (drawn, state) in enumerate(self._rows):
            _sample(scores[row], drawn, state)
        return scores


def _sample(logits_V: torch.Tensor, drawn: _Drawn, state: Any) -> None:  # noqa: N803
    """Change the logits in place, so that their argmax is the token to take."""
    sampling = drawn.sampling
    if sampling.is_greedy and not sampling.changes_logits and sampling.num_logprobs is None:
        return
    position = len(state.initial_tokens) + len(state.generated_tokens)
    scores_V = logits_V  # noqa: N806
    if sampling.changes_logits:
        tokens = state.initial_tokens + state.generated_tokens
        # A request that was put back has its answer so far among its initial tokens.
        prompt, answer = tokens[: drawn.num_prompt], tokens[drawn.num_prompt :]
        scores_V = adjust(scores_V, sampling, prompt, answer)  # noqa: N806
    scores_V = perturb(scores_V, sampling, seed=drawn.seed, position=position)  # noqa: N806
    if sampling.num_logprobs is None:
        logits_V.copy_(scores_V)
        return
    token = int(scores_V.argmax())
    drawn.logprobs[position] = describe_choice(logits_V, token, sampling.num_logprobs)
    # Of equals, the loop's argmax might choose another.
    logits_V.fill_(-torch.inf)[token] = 0


def _start_manager(
    model: Any, budget: CacheBudget, num_blocks: int, steps: queue.SimpleQueue[list[Any]]
) -> Any:
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=num_blocks,
            max_batch_tokens=budget.max_batch_tokens,
            max_requests_per_batch=budget.max_running,
            # The sampler reads request states between steps: graphs and double buffers would
            # hide them from it.
            use_cuda_graph=False,
            use_async_batching=False,
        ),
    )
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_PerRequestSampler()]))
    processors.tensors_required = 1
    manager.logit_processor = processors
    manager.output_router = _StepRouter(steps)
    manager.start()
    return manager


def _num_blocks(config: Any, dtype: torch.dtype, budget: CacheBudget) -> int:
    """Cache blocks within the budget, but no more than all running requests could fill: the
    attention mask grows with the cache too."""
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * num_kv_heads * head_size * dtype.itemsize
    affordable_tokens = budget.max_cache_bytes // token_bytes
    useful_tokens = budget.max_running * _context_tokens(config)
    return int(max(8, min(affordable_tokens, useful_tokens) // _PAGE_TOKENS))


def _context_tokens(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 0) or _DEFAULT_CONTEXT_TOKENS)
