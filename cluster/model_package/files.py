"""Which files may be in a model package, and what lies in a directory, without opening any.

Knows nothing of manifests and signatures.

    sizes = list_files(directory)   # {"manifest.json": 2310, "model/model.onnx": 5120, …}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ForbiddenFileError, PackageError

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
MODEL_DIR = "model"
GRAPH = "model.onnx"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"

ALLOWED_SUFFIXES = frozenset(
    {".json", ".safetensors", ".onnx", ".data", ".txt", ".model", ".jinja", ".md"}
)
ALLOWED_NAMES = frozenset({"LICENSE", "NOTICE"})
MAX_FILES = 10_000
MAX_DEPTH = 8

# Keys of a Hugging Face configuration that name code to run.
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
# Keys of an adapter's configuration by which peft imports what they name.
_ADAPTER_CODE_KEYS = frozenset({"auto_mapping", "megatron_config"})
# Keys whose value names code to fetch and run when it is a repository, OWNER/NAME.
_KERNEL_KEYS = frozenset(
    {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
)
# ASCII only, and nothing hidden: a name looks the same to every reader.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
_FIXES = {
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".pt2", ".npy", ".npz"),
        "pickles can run code; save the weights as safetensors "
        "(model.save_pretrained(DIR, safe_serialization=True)) or the model as ONNX",
    ),
    **dict.fromkeys(
        (".py", ".pyc", ".so", ".sh", ".dll"),
        "a package holds no code; use an architecture that transformers ships, or export to ONNX",
    ),
}


def check_file_name(name: str) -> str:
    """Return a file's path inside a package if it may be there.

    Raises:
        ForbiddenFileError: it leaves the package, is oddly named or of a kind that is not allowed.
    """
    parts = name.split("/")
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise ForbiddenFileError(
            f"file name {name[:200]!r} is not allowed in a package",
            hint="use relative paths of A-Z a-z 0-9 _ . + - without '..' and hidden files",
        )
    suffix = Path(parts[-1]).suffix.lower()
    if suffix not in ALLOWED_SUFFIXES and parts[-1] not in ALLOWED_NAMES:
        allowed = ", ".join(sorted(ALLOWED_SUFFIXES))
        raise ForbiddenFileError(
            f"file '{name}' is not allowed in a package",
            hint=_FIXES.get(suffix, f"only {allowed} files are; remove it"),
        )
    return name


def list_files(directory: Path, *, check: Callable[[str], str] = check_file_name) -> dict[str, int]:
    """Sizes in bytes of all files by path; links, devices and wrong names are refused.

    Args:
        check: what decides on names.

    Raises:
        ForbiddenFileError: naming the file.
    """
    found: dict[str, int] = {}
    _collect(directory, "", found, check)
    return dict(sorted(found.items()))


def copy_files(source: Path, target: Path) -> None:
    """Copy a directory of allowed files.

    Raises:
        ForbiddenFileError: a file is not allowed, or is a link.
    """
    target.mkdir(parents=True)
    for name in list_files(source):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy, follow_symlinks=False)


def refuse_code_references(directory: Path, names: Sequence[str]) -> None:
    """Refuse configurations that name code to run (`auto_map`). Call on verified files only."""
    for name in names:
        # Vocabularies are full of words; only configurations are searched.
        if not name.endswith("config.json"):
            continue
        try:
            values = json.loads((directory / name).read_bytes())
            is_adapter = name.endswith(ADAPTER_CONFIG)
            key = _find_key(values, _CODE_KEYS | (_ADAPTER_CODE_KEYS if is_adapter else set()))
        except (ValueError, RecursionError):
            raise PackageError(f"'{name}' is not JSON", hint="save the model again") from None
        if key is not None:
            raise ForbiddenFileError(
                f"'{name}' has '{key}', which names code to run",
                hint="remove that key, or use an architecture that transformers ships",
            )


def _collect(
    directory: Path, prefix: str, found: dict[str, int], check: Callable[[str], str]
) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(mode.st_mode):
                if name.count("/") >= MAX_DEPTH or not _PART.fullmatch(entry.name):
                    raise ForbiddenFileError(
                        f"directory {name[:200]!r} is not allowed in a package", hint="remove it"
                    )
                _collect(directory / entry.name, name + "/", found, check)
                continue
            if not stat.S_ISREG(mode.st_mode):
                raise ForbiddenFileError(
                    f"{name[:200]!r} is a link or a device, expected a plain file",
                    hint="replace it by a copy of what it points to",
                )
            found[check(name)] = mode.st_size
            if len(found) > MAX_FILES:
                raise ForbiddenFileError(
                    f"there are more than {MAX_FILES} files", hint="remove what is not the model"
                )


def _find_key(values: Any, code_keys: frozenset[str]) -> str | None:
    if isinstance(values, dict):
        for key, value in values.items():
            if (key in code_keys and value) or (key in _KERNEL_KEYS and "/" in str(value)):
                return str(key)
            if (found := _find_key(value, code_keys)) is not None:
                return found
    elif isinstance(values, list):
        for value in values:
            if (found := _find_key(value, code_keys)) is not None:
                return found
    return None
