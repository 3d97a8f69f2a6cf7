"""What a run goes on from: its base found and named for good, before anything is started.

The run's record names a version and a digest, whatever an alias means later; workers are told a
directory. It knows nothing of workers and models.

    start = find_start(config, settings)
    start.config.model.base, start.local.model.base      # 'pydoc-lm/3', '/…/model'
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ChangedFileError, InputError
from cluster.model_ref import ModelRef
from cluster.model_versions import require_language_model
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from jobs.data.config import DataConfig, ExistingTokenizer
from jobs.data.dataset import TOKENIZER_FILE, Dataset
from jobs.models.bases import Base, find_base, open_registered
from jobs.models.config import DistillationConfig, LanguageModelConfig, PretrainedLmConfig
from jobs.training.config import TrainConfig

_BASE, _TEACHER = "model.base", "model.distillation.teacher"

# What decides the ids that a text gets; the rest of the file is how it is laid out.
_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")


@dataclass(frozen=True)
class Start:
    """A config with its base settled."""

    config: TrainConfig
    """As the run is known by."""
    local: TrainConfig
    """The same with directories of this machine, for those who read the files."""
    base: Base | None = None
    teacher: Base | None = None


def find_start(config: TrainConfig, settings: Settings) -> Start:
    """Raises HeliostatError if there is no such base or teacher, or it does not go with the
    rest."""
    start, model = _from_base(config, settings), config.model
    if not isinstance(model, LanguageModelConfig) or model.distillation is None:
        return start
    teacher = _find_teacher(model.distillation, settings)
    return Start(
        config=_with_teacher(start.config, teacher, teacher.reference),
        local=_with_teacher(start.local, teacher, str(teacher.directory)),
        base=start.base,
        teacher=teacher,
    )


def _from_base(config: TrainConfig, settings: Settings) -> Start:
    model = config.model
    if not isinstance(model, PretrainedLmConfig):
        return Start(config, config)
    _require_its_tokenizer(config.data, model)
    base = find_base(model.base, settings)
    _require_digest(_BASE, model.base, base.digest, model.base_digest)
    _refuse_without_package(model, base)
    return Start(
        config=_with_base(config, model, base, base.reference),
        local=_with_base(config, model, base, str(base.directory)),
        base=base,
    )


def check_tokenizer(dataset: Dataset, base: Base, named: str = _BASE) -> None:
    """Raises InputError if the dataset's token ids mean something else to the base."""
    path = base.directory / TOKENIZER_FILE
    if path.is_file() and _ids_of(path) == _ids_of(dataset.tokenizer_path):
        return
    raise InputError(
        f"dataset '{dataset.info.name}' was made with another tokenizer than that of {named} "
        f"'{base.reference}'",
        hint=f"set data.text.tokenizer to {{kind: existing, path: {base.reference}}}",
        param="data.text.tokenizer",
    )


def _find_teacher(distillation: DistillationConfig, settings: Settings) -> Base:
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(distillation.teacher))
    require_language_model(version, _TEACHER, hint="name another", param=_TEACHER)
    _require_digest(_TEACHER, distillation.teacher, version.digest, distillation.teacher_digest)
    return open_registered(version, settings)


def _require_digest(named: str, reference: str, found: str, expected: str) -> None:
    if expected not in ("", found):
        raise ChangedFileError(
            f"{named} '{reference}' has digest {found}, expected {expected}",
            hint=f"correct {named}_digest, or leave it out",
        )


def _with_teacher(config: TrainConfig, teacher: Base, location: str) -> TrainConfig:
    model = config.model
    assert isinstance(model, LanguageModelConfig), "others have no teacher"
    assert model.distillation is not None
    update = {"teacher": location, "teacher_digest": teacher.digest}
    settled = model.distillation.model_copy(update=update)
    return config.model_copy(update={"model": model.model_copy(update={"distillation": settled})})


def _require_its_tokenizer(data: DataConfig, model: PretrainedLmConfig) -> None:
    kind = data.text.tokenizer.kind
    if data.kind == "text" and kind != "existing":
        raise InputError(
            f"model.base '{model.base}' has a tokenizer of its own, and data.text.tokenizer of "
            f"kind '{kind}' would be another",
            hint=f"set data.text.tokenizer to {{kind: existing, path: {model.base}}}",
            param="data.text.tokenizer",
        )


def _refuse_without_package(model: PretrainedLmConfig, base: Base) -> None:
    if model.lora is not None and not model.lora.merge and base.package is None:
        raise InputError(
            f"an adapter names the package of its base, and model.base '{model.base}' has none",
            hint="import it (heliostat models import DIR --name NAME) and set model.base to NAME, "
            "or set model.lora.merge to true",
            param="model.base",
        )


def _with_base(
    config: TrainConfig, model: PretrainedLmConfig, base: Base, location: str
) -> TrainConfig:
    data, tokenizer = config.data, config.data.text.tokenizer
    if isinstance(tokenizer, ExistingTokenizer) and tokenizer.path == model.base:
        theirs = tokenizer.model_copy(update={"path": location})
        text = data.text.model_copy(update={"tokenizer": theirs})
        data = data.model_copy(update={"text": text})
    settled = model.model_copy(update={"base": location, "base_digest": base.digest})
    return config.model_copy(update={"model": settled, "data": data})


def _ids_of(path: Path) -> list[object]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(
            f"'{path}' is no tokenizer: it holds no JSON object",
            hint="save the tokenizer again with save_pretrained",
            param="model.base",
        )
    return [content.get(part) for part in _PARTS]
