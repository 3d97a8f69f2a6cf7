"""A client of POST /v1/completions that costs little: streams over plain sockets.

    python -m benchmarks.llm_peers.completions_load '{"url": "http://127.0.0.1:8000", …}'

Prints its figures as JSON. Prompts are random token ids, greedy; every answer has to be complete.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from benchmarks.llm_peers.figures import Figures, StreamTimes, closed_loop

_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Load:
    """What to ask, and how much of it at once."""

    url: str
    model: str
    num_streams: int
    num_answers: int
    prompt_tokens: int
    new_tokens: int
    first_id: int
    last_id: int
    """Token ids to draw prompts from."""
    seed: int
    num_shared_tokens: int = 0
    """Of each prompt, how many it shares with others that begin likewise."""
    num_beginnings: int = 1

    def prompt(self, number: int) -> list[int]:
        """Never twice the same."""
        shared = self._draw(f"{number % self.num_beginnings}", self.num_shared_tokens)
        own = self._draw(f"{self.seed}:{number}", self.prompt_tokens - self.num_shared_tokens)
        return shared + own

    def run(self, key: str) -> Figures:
        """In a process of its own, which takes no time from the one that asks."""
        found = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(asdict(self))],
            env={**os.environ, "HELIOSTAT_API_KEY": key},
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            raise RuntimeError(f"{self.url}: {found.stderr.strip()[-800:]}")
        return Figures(**json.loads(found.stdout))

    def _draw(self, seed: str, count: int) -> list[int]:
        drawn = random.Random(seed)
        return [drawn.randint(self.first_id, self.last_id) for _ in range(count)]


async def read_answer(load: Load, prompt: list[int], key: str) -> StreamTimes:
    """Ask once.

    Raises:
        RuntimeError: the answer is not a whole one.
    """
    target = urlsplit(load.url)
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    received, first_s = bytearray(), 0.0
    while chunk := await reader.read(65_536):
        received += chunk
        if not first_s and b'"text"' in received:
            first_s = time.perf_counter()
    ended_s = time.perf_counter()
    writer.close()
    usage = _USAGE.findall(bytes(received))
    if not usage or int(usage[-1]) != load.new_tokens:
        raise RuntimeError(f"not {load.new_tokens} tokens: {bytes(received[-400:])!r}")
    return StreamTimes(began_s, first_s, ended_s, load.new_tokens)


async def main(load: Load) -> Figures:
    key = os.environ.get("HELIOSTAT_API_KEY", "")
    prompts = [load.prompt(number) for number in range(load.num_answers)]
    return await closed_loop(
        load.num_streams,
        load.num_answers,
        lambda number: read_answer(load, prompts[number], key),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(main(Load(**json.loads(sys.argv[1])))))))
