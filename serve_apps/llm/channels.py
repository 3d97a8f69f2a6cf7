"""Outputs of many answers for one reader, together: one message for each of the engine's steps.

Every answer has a stream of its own, and a message costs as much as a few of its tokens. A reader
of several answers, such as a gateway, opens a channel beside them: while it is open, what they
consist of comes there, but for the last of each, which ends the answer's own stream. Positions tell
in which order all of it belongs, so nothing depends on when a channel opens or ends.

    if not channels.tell(reader, part):
        yield part
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from serve_apps.llm.engine import TokenOutput
from serve_apps.llm.mailbox import Mailbox

Part = tuple[int, TokenOutput]
"""How many tokens of this answer came before from here, and new ones."""
MIN_ANSWERS = 4
"""From so many of one reader on a channel pays; it counts as one more call, for autoscaling too."""
_IDLE_S = 2.0


@dataclass(frozen=True)
class Channel:
    """What a reader asks for."""

    request_id: str
    reader: str
    """Whose answers they are."""
    replica: str
    """Where the router sends it."""


class OutputChannels:
    """Those that are open at one replica, by reader."""

    def __init__(self) -> None:
        self._open: dict[str, Mailbox[Part]] = {}
        self._num_answers: Counter[str] = Counter()

    @contextlib.contextmanager
    def answering(self, reader: str) -> Iterator[None]:
        """While an answer of this reader's is generated."""
        self._num_answers[reader] += 1
        try:
            yield
        finally:
            self._num_answers[reader] -= 1
            if not self._num_answers[reader]:
                del self._num_answers[reader]

    def tell(self, reader: str, part: Part) -> bool:
        """Whether a channel took it."""
        messages = self._open.get(reader)
        if messages is None or part[1].finish_reason is not None:
            return False
        messages.put(part)
        return True

    async def listen(self, asked: Channel) -> AsyncGenerator[list[Part], None]:
        """Messages until few answers are left, or nothing comes for a while. It is the replica
        that ends a channel: what was put into one that its reader has closed would be lost."""
        messages = self._open[asked.reader] = Mailbox[Part]()
        try:
            while parts := await messages.take(_IDLE_S):
                yield parts
                if not messages.items and self._num_answers[asked.reader] < MIN_ANSWERS:
                    return
        finally:
            del self._open[asked.reader]
