"""Conversations become token ids and a mask of the tokens to learn: the assistant's answers.

The tokenizer's own chat template writes them, as it will when the model is served. Where it marks
answers with `{% generation %}`, those are learnt; otherwise an answer is what its turn adds to the
text that asks for it. It knows nothing about files or rows.

    ids, mask = ChatEncoder(files).encode([{"role": "user", "content": "Hi"}, …], lambda: "a:1")
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from cluster.processing.chat_template import Spans, render_chat
from cluster.processing.text import SpecialTokenGuard
from jobs.data.documents import Conversation, Locate
from jobs.data.tokenizer_files import TokenizerFiles
from jobs.data.tokenizing import Ids, may_cut

ASSISTANT = "assistant"
Mask = npt.NDArray[np.bool_]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chat_template(files: TokenizerFiles) -> None:
    """Raises InputError if the tokenizer has none."""
    if not files.chat_template:
        raise InputError(
            f"'{files.name}' has no chat template",
            hint="give one with data.text.tokenizer.chat_template=FILE "
            "(jobs/data/plain_chat.jinja is a plain one)",
            param="data.text.tokenizer.chat_template",
        )


@functools.lru_cache(maxsize=2)
def make_chat_encoder(files: TokenizerFiles) -> ChatEncoder:
    return ChatEncoder(files)


class ChatEncoder:
    """Raises InputError if the tokenizer has no chat template."""

    def __init__(self, files: TokenizerFiles) -> None:
        check_chat_template(files)
        self._template = files.chat_template
        self._special_tokens = files.special_tokens
        # As `TextProcessor` does when it serves: what a user wrote stays plain text.
        self._plain, self._marked = files.load(), files.load()
        self._plain.encode_special_tokens = True
        self._may_cut = may_cut(self._marked)
        added = self._marked.get_added_tokens_decoder().values()
        self._special = [token.content for token in added if token.special]

    def encode(self, conversation: Conversation, locate: Locate) -> tuple[Ids, Mask]:
        """Ids of the whole conversation, and which of them are to be predicted.

        Raises:
            InputError: the template refuses the conversation, or does not show its answers.
        """
        guard = SpecialTokenGuard(self._special)
        messages = [guard.hide(message) for message in conversation]
        rendered, spans = self._render(messages, locate)
        ids: list[int] = []
        starts: list[int] = []
        # What is served ends where an answer begins, so no token may reach across.
        cuts = [first for first, _ in spans] if self._may_cut else []
        for first, end in itertools.pairwise(sorted({0, *cuts, len(rendered)})):
            for start, token_ids, offsets in self._tokens(guard, rendered[first:end]):
                ids += token_ids
                starts += [first + start + offset for offset in offsets]
        mask = np.zeros(len(ids), dtype=bool)
        for first, end in spans:
            mask |= (np.asarray(starts) >= first) & (np.asarray(starts) < end)
        # Nothing comes before the first token to predict it from.
        mask[:1] = False
        return np.asarray(ids, dtype=np.int64), mask

    def _render(self, messages: Conversation, locate: Locate) -> tuple[str, Spans]:
        if _GENERATION.search(self._template):
            return self._apply(messages, locate)
        rendered, _ = self._apply(messages, locate)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            question, _ = self._apply(messages[:number], locate, is_question=True)
            answered, _ = self._apply(messages[: number + 1], locate)
            if not (answered.startswith(question) and rendered.startswith(answered)):
                raise InputError(
                    f"'{locate()}': the chat template writes the turns before message "
                    f"{number + 1} otherwise once it is answered, so answers cannot be told apart",
                    hint="mark them in the template with {% generation %}, or give one with "
                    "data.text.tokenizer.chat_template=FILE",
                    param="data.text.tokenizer.chat_template",
                )
            spans.append((len(question), len(answered)))
        return rendered, spans

    def _apply(
        self,
        messages: Conversation,
        locate: Locate,
        *,
        is_question: bool = False,
    ) -> tuple[str, Spans]:
        try:
            return render_chat(
                self._template,
                messages,
                add_generation_prompt=is_question,
                **self._special_tokens,
            )
        # A template is a program: it may divide by zero or recurse for ever.
        except Exception as error:
            raise InputError(
                f"'{locate()}': the chat template refuses this conversation: "
                f"{' '.join(str(error).split())}",
                hint="check the order and the roles of its messages",
                param="data.source.paths",
            ) from None

    def _tokens(
        self, guard: SpecialTokenGuard, rendered: str
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """Pieces of the text: where each begins, its ids, and where in it these begin."""
        position = 0
        for piece, is_users in guard.split(rendered):
            tokenizer: Any = self._plain if is_users else self._marked
            encoding = tokenizer.encode(piece, add_special_tokens=False)
            width = len(guard.mark_of(piece)) if is_users else len(piece)
            # A user's special token is wholly inside or outside an answer.
            offsets = [0 if is_users else start for start, _ in encoding.offsets]
            yield position, list(encoding.ids), offsets
            position += width
