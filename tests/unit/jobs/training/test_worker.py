"""One worker's training, in this process: resuming, failing saves, metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, InputError, JobFailedError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training.checkpointing import FolderStore
from jobs.training.config import TrainConfig
from jobs.training.events import Evaluated, Event, Fault, Notice, Progress, Saved, Started
from jobs.training.step_log import read_steps
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig

# Blocking, so that what is there when a run is interrupted does not depend on the disk.
EVERY_3 = {"every_steps": 3, "blocking": True}


class InterruptedRunError(Exception):
    pass


class Recorder:
    """A sink that can stop the training after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Progress) and event.step == self._stop_after:
            raise InterruptedRunError

    def losses(self) -> dict[int, float]:
        return {e.step: e.loss for e in self.events if isinstance(e, Progress)}

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting has tests of its own, and takes seconds."""
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)


def run(config: TrainConfig, dataset: Dataset, run_dir: Path, recorder: Recorder) -> Outcome:
    return run_worker(WorkerJob(config, dataset.directory, run_dir), recorder)


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(checkpoint=EVERY_3, batch_size=12, micro_batch_size=4)
    unbroken, first, second = Recorder(), Recorder(stop_after=5), Recorder()
    whole = run(config, digits, tmp_path / "unbroken", unbroken)
    with pytest.raises(InterruptedRunError):
        run(config, digits, tmp_path / "broken", first)
    resumed = run(config, digits, tmp_path / "broken", second)
    assert second.of(Started)[0].first_step == 3
    assert {**first.losses(), **second.losses()} == unbroken.losses()
    assert resumed.metrics == whole.metrics


def test_a_finished_training_only_measures_again(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    first = run(make_config(), digits, tmp_path, Recorder())
    again = Recorder()
    assert run(make_config(), digits, tmp_path, again).metrics == first.metrics
    assert again.losses() == {}


def test_a_save_that_fails_does_not_stop_the_training(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FolderStore.write
    failures = iter([OSError(28, "No space left on device")])

    def fail_once(store: FolderStore, *arguments: Any) -> None:
        write(store, *arguments)
        for failure in failures:
            raise failure

    monkeypatch.setattr(FolderStore, "write", fail_once)
    recorder = Recorder()
    run(make_config(checkpoint={"every_steps": 4}), digits, tmp_path, recorder)
    (fault,) = recorder.of(Fault)
    assert (fault.step, fault.kind) == (4, "checkpoint_failed")
    assert "checkpoint at step 4 was not saved" in fault.text
    assert "No space left on device" in fault.text
    assert [event.step for event in recorder.of(Saved)] == [8]
    assert sorted(recorder.losses()) == list(range(1, 9))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_corrupt_newest_checkpoint_costs_one_warning(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    config = make_config(checkpoint=EVERY_3)
    with pytest.raises(InterruptedRunError):
        run(config, digits, tmp_path, Recorder(stop_after=7))
    damage(tmp_path / "checkpoints/step-00000006/rank-00000.safetensors")
    recorder = Recorder()
    run(config, digits, tmp_path, recorder)
    (fault,) = recorder.of(Fault)
    assert fault.kind == "checkpoint_corrupt"
    assert "step-00000006 is corrupt (rank-00000.safetensors has" in fault.text
    assert (tmp_path / "checkpoints/corrupt-step-00000006").is_dir()
    assert recorder.of(Started)[0].first_step == 3


def test_steps_that_are_missing_from_the_audit_are_said(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(checkpoint=EVERY_3)
    with pytest.raises(InterruptedRunError):
        run(config, digits, tmp_path, Recorder(stop_after=7))
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    recorder, again = Recorder(), Recorder()
    run(config, digits, tmp_path, recorder)
    (notice,) = recorder.of(Notice)
    assert "steps 3 to 6 are missing from the audit" in notice.text
    assert [record.step for record in read_steps(path)] == [1, 2, 7, 8]
    run(config, digits, tmp_path, again)
    assert again.of(Notice) == []


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(
        optimizer={"name": "sgd", "learning_rate": 1e30}, gradient_clipping=0, steps=20
    )
    with pytest.raises(JobFailedError, match="the loss is nan at step"):
        run(config, digits, tmp_path, Recorder())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, stage: int
) -> None:
    config = make_config(deepspeed={"zero_optimization": {"stage": stage}}, steps=3)
    recorder = Recorder()
    run(config, digits, tmp_path, recorder)
    reference = Recorder()
    run(make_config(steps=3), digits, tmp_path / "reference", reference)
    assert recorder.losses() == pytest.approx(reference.losses(), rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("stage", [1, 3])
def test_sharded_optimizers_compute_what_whole_ones_do(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, name: str, stage: int
) -> None:
    values = {"optimizer": {"name": name, "learning_rate": 0.01}, "steps": 4}
    found = []
    for run_dir, zero in (("whole", 0), ("sharded", stage)):
        recorder = Recorder()
        config = make_config(**values, deepspeed={"zero_optimization": {"stage": zero}})
        run(config, digits, tmp_path / run_dir, recorder)
        found.append(recorder.losses())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_existing_ds_config_trains(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    raw = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-3, "warmup_num_steps": 4},
        },
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    recorder = Recorder()
    run(make_config(deepspeed=raw, precision="bf16", steps=12), digits, tmp_path, recorder)
    losses = recorder.losses()
    assert losses[12] < losses[1]
    rates = [event.learning_rate for event in recorder.of(Progress)]
    assert rates[-1] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"zero_optimization": {"stage": 1, "sub_group_size": -1}}, "sub_group_size: "),
        ({"checkpoint": {"tag_validation": "perhaps"}}, "tag_validation"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, section: dict[str, Any], key: str
) -> None:
    config = make_config(deepspeed=section)
    with pytest.raises(ConfigError, match=f"DeepSpeed refuses the .*{key}") as caught:
        run(config, digits, tmp_path, Recorder())
    assert "\n" not in str(caught.value)


def test_a_language_model_learns(
    make_config: MakeConfig, text_data: dict[str, Any], tmp_path: Path
) -> None:
    config = make_config(
        data=text_data,
        model={"family": "causal_lm", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        optimizer={"learning_rate": 1e-2},
        precision="bf16",
        steps=30,
    )
    catalog = DatasetCatalog(Storage.open(str(tmp_path / "storage")), tmp_path / "cache")
    dataset, _ = catalog.ensure(config.data)
    outcome = run(config, dataset, tmp_path / "run", Recorder())
    assert outcome.metrics["validation/loss"] < dataset.text.unigram_entropy


def test_evaluations_do_not_depend_on_the_batch_size(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    found = []
    for micro in (1, 7):
        recorder = Recorder()
        run(
            make_config(
                batch_size=7,
                micro_batch_size=micro,
                steps=1,
                model={"family": "cnn", "channels": [2], "hidden_size": 8, "dropout": 0.0},
            ),
            digits,
            tmp_path / str(micro),
            recorder,
        )
        found.append(recorder.of(Evaluated)[-1].metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_text_families_refuse_arrays(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    config = make_config(model={"family": "causal_lm"})
    with pytest.raises(InputError, match="'causal_lm' needs text"):
        run(config, digits, tmp_path, Recorder())
