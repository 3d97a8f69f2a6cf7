"""From a language model's tokens to the text a client sees.

Tokenising is done before; here tokens become text, stop strings end it, and tokens are counted.
Knows nothing of HTTP.

    answer = TextAnswer(models, model, request, stops=["\\n"])
    async for piece in answer.pieces():
        print(piece)
    print(answer.finish_reason, answer.completion_tokens)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from cluster.processing.text import StopStrings, TextProcessor
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models
from serve_apps.llm.engine import EngineRequest, TokenOutput


class TextAnswer:
    """One answer while it is being generated."""

    def __init__(
        self,
        models: Models,
        model: ServedModel,
        request: EngineRequest,
        *,
        stops: Sequence[str] = (),
    ) -> None:
        self._models = models
        self._model = model
        self._request = request
        self._text: TextProcessor = model.require_text()[0]
        self._stops = StopStrings(stops)
        self.prompt_tokens = len(request.prompt_ids)
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        """'stop' or 'length' once the answer has ended."""

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Text as it comes, never part of a character or of a stop string."""
        detokenizer = self._text.detokenizer()
        outputs = self._models.generate(self._model, self._request)
        try:
            async for output in outputs:
                self.completion_tokens += len(output.token_ids)
                piece = self._stops.push(detokenizer.push(_visible(output)))
                if self._stops.matched is not None:
                    self.finish_reason = "stop"
                elif output.finish_reason is not None:
                    self.finish_reason = output.finish_reason
                    piece += self._last_piece(detokenizer.flush())
                if piece:
                    yield piece
                if self.finish_reason is not None:
                    return
        finally:
            await outputs.aclose()

    async def whole(self) -> str:
        """The complete text."""
        return "".join([piece async for piece in self.pieces()])

    def _last_piece(self, rest: str) -> str:
        piece = self._stops.push(rest)
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            return piece
        return piece + self._stops.flush()


def _visible(output: TokenOutput) -> tuple[int, ...]:
    """The tokens without the end-of-sequence token, which is no part of the text."""
    return output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
