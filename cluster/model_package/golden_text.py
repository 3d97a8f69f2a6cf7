"""Golden texts: what a language model's tokenizer and chat template make of a few texts.

Computed when a package is written, replayed wherever its tokenizer is loaded: the files are the
signed ones, but another version of a library may read them otherwise. Never loads torch.

    inputs, outputs = compute_text(TextProcessor.load(model_dir))
    check_text(package.manifest, TextProcessor.load(package.model_dir))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError, ParityError
from cluster.model_package.files import TOKENIZER
from cluster.model_package.manifest import Manifest

if TYPE_CHECKING:
    from cluster.model_package.reader import ModelPackage
    from cluster.processing.text import TextProcessor

_TEXTS = (
    "Hello, world! 1234567890",
    "  two  spaces,\na\ttab and\n\nan empty line ",
    "naïve café, ΑΒΓ, 定日镜跟随太阳, 🌞",
    "def f(x: int) -> str: return f'{x:>8}'",
    "<|user|> </s> [INST] no special tokens",
)
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\na heliostat?"},
        {"role": "assistant", "content": "A mirror."},
        {"role": "user", "content": "定日镜?"},
    ],
)
_SHOWN = 20


def compute_text(text: TextProcessor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into the inputs and the outputs of `Golden`; of conversations, those that the
    template takes."""
    chats = [chat for chat in _CHATS if _is_taken(text, chat)]
    token_ids = [text.encode(given) for given in _TEXTS]
    inputs = {"texts": list(_TEXTS), "chats": chats}
    outputs = {
        "text_ids": token_ids,
        "decoded_texts": [text.decode(ids) for ids in token_ids],
        "chat_texts": [text.render_chat(chat) for chat in chats],
        "chat_ids": [text.encode_chat(chat) for chat in chats],
    }
    return inputs, outputs


def check_text_of(package: ModelPackage) -> None:
    """As `check_text`, with the package's own files.

    Raises:
        ParityError: naming the first difference.
    """
    from cluster.processing.text import TextProcessor

    if (package.model_dir / TOKENIZER).is_file():
        check_text(package.manifest, TextProcessor.load(package.model_dir))


def check_text(manifest: Manifest, text: TextProcessor) -> None:
    """Hold a tokenizer and a chat template against the golden texts; packages that were written
    before there were any have none.

    Raises:
        ParityError: naming the first difference.
    """
    inputs: Any = manifest.golden.inputs
    outputs: Any = manifest.golden.outputs
    if not isinstance(inputs, dict) or "texts" not in inputs:
        return
    try:
        texts, chats = list(inputs["texts"]), list(inputs["chats"])
        token_ids = list(outputs["text_ids"])
        pairs: list[tuple[str, Sequence[Any], Sequence[Any], Callable[[Any], Any]]] = [
            ("token ids of text", texts, token_ids, text.encode),
            ("text of tokens", token_ids, outputs["decoded_texts"], text.decode),
            ("rendered conversation", chats, outputs["chat_texts"], text.render_chat),
            ("token ids of conversation", chats, outputs["chat_ids"], text.encode_chat),
        ]
        for what, given, expected, compute in pairs:
            for number, (one, wanted) in enumerate(zip(given, expected, strict=True)):
                _compare(f"{what} {number}", compute(one), wanted)
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ParityError(
            f"golden texts do not fit the tokenizer and the chat template: {error}",
            hint="publish the package again",
        ) from None


def _compare(what: str, found: Sequence[Any], expected: Sequence[Any]) -> None:
    if found == expected:
        return
    first = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )
    raise ParityError(
        f"golden outputs are not reproduced: {what} differs at {first}: "
        f"{found[first : first + _SHOWN]!r}, expected {expected[first : first + _SHOWN]!r}",
        hint="the tokenizer or the chat template is not read as the package's author saw it; "
        "compare the versions of tokenizers and Jinja2",
    )


def _is_taken(text: TextProcessor, chat: list[dict[str, str]]) -> bool:
    try:
        text.encode_chat(chat)
    except InputError:
        return False
    return True
