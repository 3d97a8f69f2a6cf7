"""From a language model's tokens to the text a client sees.

Tokenising is done before; here tokens become text, stop strings end it, and tokens are counted.
Knows nothing of HTTP.

    answer = TextAnswer(models, model, request, stops=["\\n"])
    async for piece in answer.pieces():
        print(piece.text)
    print(answer.finish_reason, answer.completion_tokens)
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from cluster.errors import InputError
from cluster.processing.text import StopStrings, TextProcessor
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.interleaving import interleave
from serve_apps.llm.engine import EngineRequest, TokenLogprobs, TokenOutput

_LOWEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of the answer with how likely the model found it."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """The most likely tokens with theirs, best first."""
    offset: int
    """Characters of the answer before it."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or all of it."""

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    """Those that the text is made of, if log-probabilities were asked for."""


class TextAnswer:
    """One answer while it is being generated."""

    def __init__(
        self,
        models: Models,
        model: ServedModel,
        request: EngineRequest,
        *,
        stops: Sequence[str] = (),
        field_of: Callable[[str | None], str | None] = lambda param: param,
    ) -> None:
        """`field_of`: the client's name for what an engine calls otherwise."""
        self._models = models
        self._model = model
        self._request = request
        self._field_of = field_of
        self._text: TextProcessor = model.require_text()[0]
        self._detokenizer = self._text.detokenizer()
        self._stops = StopStrings(stops)
        self._unreleased: deque[ScoredToken] = deque()
        """Tokens whose text is held back."""
        self._num_decoded = self._num_released = 0
        """Characters."""
        self.prompt_tokens = len(request.prompt_ids)
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        """'stop' or 'length' once the answer has ended."""

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes, never part of a character or of a stop string."""
        outputs = self._models.generate(self._model, self._request)
        try:
            async for output in outputs:
                piece = self._release(self._take(output))
                if piece.text or piece.tokens:
                    yield piece
                if self.finish_reason is not None:
                    return
        except InputError as error:
            error.param = self._field_of(error.param)
            raise
        finally:
            await outputs.aclose()

    def _take(self, output: TokenOutput) -> str:
        """What may be shown after these tokens; those after a stop string do not count."""
        text = ""
        for index, token_id in enumerate(_visible(output)):
            self.completion_tokens += 1
            if output.logprobs:
                self._unreleased.append(self._scored(output.logprobs[index]))
            decoded = self._detokenizer.push((token_id,))
            self._num_decoded += len(decoded)
            text += self._stops.push(decoded)
            if self._stops.matched is not None:
                self.finish_reason = "stop"
                return text
        if output.finish_reason is not None:
            self.completion_tokens += output.finish_reason == "stop"
            self.finish_reason = output.finish_reason
            text += self._last_text()
        return text

    def _last_text(self) -> str:
        text = self._stops.push(self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()

    def _release(self, text: str) -> Piece:
        self._num_released += len(text)
        is_complete = self.finish_reason is not None and self._stops.matched is None
        tokens: list[ScoredToken] = []
        while self._unreleased and (is_complete or self._unreleased[0].offset < self._num_released):
            tokens.append(self._unreleased.popleft())
        return Piece(text, tuple(tokens))

    def _scored(self, entry: TokenLogprobs) -> ScoredToken:
        return ScoredToken(
            self._text.token_text(entry.token_id),
            max(entry.logprob, _LOWEST_LOGPROB),
            tuple(
                (self._text.token_text(token), max(logprob, _LOWEST_LOGPROB))
                for token, logprob in entry.top
            ),
            self._num_decoded,
        )


class TextAnswers:
    """All answers to one request: as many for each prompt, one prompt after the other."""

    def __init__(self, answers: Sequence[TextAnswer], *, num_per_prompt: int = 1) -> None:
        self.answers = answers
        self._num_per_prompt = num_per_prompt

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once."""
        return sum(answer.prompt_tokens for answer in self.answers[:: self._num_per_prompt])

    @property
    def completion_tokens(self) -> int:
        return sum(answer.completion_tokens for answer in self.answers)

    def pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Pieces with the number of their answer, and None at the end of each."""
        return interleave([answer.pieces() for answer in self.answers])

    async def whole(self) -> list[Piece]:
        """The complete answers."""
        parts: list[list[Piece]] = [[] for _ in self.answers]
        async for number, piece in self.pieces():
            if piece is not None:
                parts[number].append(piece)
        return [_joined(pieces) for pieces in parts]


def _joined(pieces: Sequence[Piece]) -> Piece:
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece("".join(piece.text for piece in pieces), tokens)


def _visible(output: TokenOutput) -> tuple[int, ...]:
    """The tokens without the end-of-sequence token, which is no part of the text."""
    return output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
