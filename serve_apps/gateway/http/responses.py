"""JSON answers, written quickly, NumPy arrays included.

return JsonResponse({"object": "list", "data": embeddings})
"""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import JSONResponse


def write_json(content: Any) -> bytes:
    """As JsonResponse has it."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class JsonResponse(JSONResponse):
    """Numbers must be finite: what is not is written as null."""

    def render(self, content: Any) -> bytes:
        return write_json(content)
