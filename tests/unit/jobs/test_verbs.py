"""The verbs as they are called: prepare, train, evaluate; and their one-line errors."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.demo import print_origin
from cluster.cli.import_model import import_path
from cluster.database import open_database
from cluster.garbage import find_garbage, remove
from cluster.ledger import Ledger
from cluster.lineage import trace
from cluster.model_package import ensure_local_key, golden, open_version
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.statistics.profile import read_profile
from cluster.tracking import open_client
from tests.tiny_models import save_llama

ROOT = Path(__file__).parents[3]
DIGITS: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "name": "digits",
        "source": {"kind": "sklearn", "dataset": "digits"},
        "splits": {"test": 0.2},
    },
    "model": {"family": "cnn", "channels": [8], "hidden_size": 32},
    "steps": 40,
    "batch_size": 32,
    "optimizer": {"learning_rate": 5e-3},
    "launcher": "local",
    "checkpoint": {"every_steps": 10},
}


@dataclass
class Result:
    exit_code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line, for programs."""
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("result: ")
        values: dict[str, Any] = json.loads(last.removeprefix("result: "))
        return values


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose MLflow is a file, so that nothing needs to run."""
    home = tmp_path_factory.mktemp("home")
    ensure_local_key(home / "keys")
    with pytest.MonkeyPatch.context() as patch:
        # Such an MLflow keeps artifacts below the current directory.
        patch.chdir(home)
        patch.setenv("HELIOSTAT_HOME", str(home))
        patch.setenv("HELIOSTAT_MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        yield home


Call = Callable[..., Result]


@pytest.fixture
def call(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Call]:
    """Call a verb with a config, as `python -m jobs.VERB` does."""
    previous = signal.getsignal(signal.SIGTERM)

    def call(verb: str, config: Path | dict[str, Any], *arguments: str) -> Result:
        path = config if isinstance(config, Path) else tmp_path / "config.yaml"
        if isinstance(config, dict):
            path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", [verb, "--config", str(path), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(f"jobs.{verb}", run_name="__main__")
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, out, err)

    yield call
    signal.signal(signal.SIGTERM, previous)


def test_a_life_in_one_process(call: Call, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = call("train", DIGITS)
    assert trained.exit_code == 0, trained.err
    assert "registered tiny/1 (sha256:" in trained.out
    assert "step 40/40  loss" in trained.out
    assert trained.result["metrics"]["test/accuracy"] > 0.5

    settings = Settings()
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("tiny@candidate"))
    assert version.digest == trained.result["digest"]
    package = open_version(version, settings)
    golden.replay(package)
    lineage = package.manifest.lineage
    assert lineage.run_id == trained.result["run_id"]
    assert lineage.dataset_digest == trained.result["dataset_digest"]
    assert package.manifest.profile["columns"]["pixels"]["max"] == 16.0
    profile = read_profile(package.manifest.profile)
    assert profile is not None
    assert "label" in profile.outputs
    links = {link.what: link for link in trace(package, settings)}
    assert links.keys() == {"package", "dataset", "commit", "run"}
    assert (links["dataset"].state, links["dataset"].note.split(",")[0]) == ("verified", "digits")
    assert links["commit"].state in ("verified", "recorded")
    registry = ModelRegistry.open(settings)
    registry.set_alias("tiny", "champion", version.version, actor="test", reason="served")
    print_origin(settings, registry, "tiny")
    shown = capfd.readouterr().out.splitlines()
    assert shown[0] == "tiny/1"
    assert [line.split()[:2] for line in shown[1:]] == [
        [link.what, link.state] for link in links.values()
    ]

    (used,) = Ledger(open_database(settings.database)).totals(source=trained.result["run_id"])
    assert (used.tenant, used.kind, used.model) == ("local", "training", "tiny")
    assert used.cpu_s > trained.result["training_seconds"] * 0.5
    measured = open_client(settings).get_run(trained.result["run_id"]).data.metrics
    assert measured.keys() >= {
        "train/gradient_norm", "train/goodput", "memory/peak_bytes", "seconds/data",
        "seconds/forward", "seconds/backward", "seconds/step", "goodput/useful",
    }  # fmt: skip
    assert 0 < measured["train/goodput"] < 1

    evaluated = call("evaluate", {"model": "tiny@candidate", "batch_size": 100})
    assert evaluated.exit_code == 0, evaluated.err
    for name in ("accuracy", "precision", "recall", "f1"):
        trained_value = trained.result["metrics"][f"test/{name}"]
        assert evaluated.result["metrics"][name] == pytest.approx(trained_value, abs=0.01)

    again = call("train", DIGITS, "--set", "resume=reuse")
    assert "already trained: tiny/1" in again.out
    assert again.result == trained.result

    found = call("prepare", DIGITS["data"])
    assert "already prepared dataset digits" in found.out
    assert found.result["digest"] == trained.result["dataset_digest"]


STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "exit_code"), STOPS)
def test_a_training_that_is_stopped_leaves_a_checkpoint_and_one_line(
    call: Call, home: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    config = {**DIGITS, "name": f"stopped-by-{number}", "steps": 6}
    with monkeypatch.context() as patch:
        patch.setattr("jobs.training.loop.seed_everything", at_step(3, number))
        stopped = call("train", config)
    assert stopped.exit_code == exit_code
    assert stopped.err.endswith("stopped at step 4; run it again to resume\n"), stopped.err
    (events,) = (home / "runs").glob(f"{config['name']}-*/events.jsonl")
    (line,) = events.read_text().splitlines()
    assert json.loads(line)["text"] == "asked to stop at step 4 of 6"
    resumed = call("train", config)
    assert resumed.exit_code == 0, resumed.err
    assert "resumed from the checkpoint at step 4" in resumed.out


def at_step(number: int, signal_number: int) -> Callable[[int, int, int], None]:
    def raise_then(_seed: int, step: int, _copy: int) -> None:
        if step == number:
            signal.raise_signal(signal_number)

    return raise_then


@pytest.mark.parametrize(
    ("number", "exit_code", "said"), [(*STOPS[0], "stopped"), (*STOPS[1], "interrupted")]
)
def test_a_training_that_is_stopped_in_its_export_says_so(
    call: Call, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int, said: str
) -> None:
    monkeypatch.setattr(
        "jobs.training.worker._Worker._export", lambda _worker: signal.raise_signal(number)
    )
    stopped = call("train", {**DIGITS, "name": "stopped-late", "steps": 2, "resume": "never"})
    assert stopped.exit_code == exit_code
    assert stopped.err.endswith(f"{said}; run it again to go on\n"), stopped.err


def test_a_table_with_gaps_is_trained_on_and_its_gaps_are_logged(
    call: Call, home: Path, tmp_path: Path
) -> None:
    lines = [f"{n % 13},{n % 7 if n % 10 else ''},{n % 13 + 2 * (n % 7)}" for n in range(100)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,b,y", *lines]))
    source = {"kind": "table", "path": str(table), "target": "y", "task": "regression"}
    config = {
        "name": "sums",
        "data": {"name": "sums", "source": source, "splits": {"test": 0.2}},
        "model": {"family": "linear_regression"},
        "optimizer": {"name": "adam", "learning_rate": 0.1, "weight_decay": 0},
        "steps": 60,
        "batch_size": 16,
        "launcher": "local",
        "checkpoint": {"location": str(tmp_path / "elsewhere")},
    }
    refused = call("train", config, "--check")
    assert refused.exit_code == 2
    assert refused.err.startswith(f"error: '{table}', line 2, column 'b' is empty (10 missing")
    trained = call("train", config, "--set", "data.table.missing=drop")
    assert trained.exit_code == 0, trained.err
    assert "missing cells 10 (b 10): rows dropped: train " in trained.out
    assert trained.result["metrics"]["test/r2"] > 0.95
    run = open_client(Settings()).get_run(trained.result["run_id"])
    assert run.data.metrics["data/dropped_rows"] == 10
    evaluated = call("evaluate", {"model": "sums@candidate"})
    rmse = trained.result["metrics"]["test/rmse"]
    assert evaluated.result["metrics"]["rmse"] == pytest.approx(rmse, rel=1e-4)

    garbage = find_garbage(Settings(), older_than_s=0)
    (saved,) = (found for found in garbage if found.key.startswith(str(tmp_path)))
    assert saved.size_bytes == sum(
        path.stat().st_size for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()
    )
    assert remove(saved, Settings())
    assert not list((tmp_path / "elsewhere").rglob("step-*"))


def test_a_worse_version_is_refused_and_a_forced_one_is_recorded(call: Call, home: Path) -> None:
    """The first of two versions has no champion to beat; the second has learnt nothing."""
    service = {
        "service": "reading",
        "model": "gated",
        "owner": "us",
        "purpose": "reads digits",
        "metric": "accuracy",
        "objective": 0.5,
        "budget": {"max_regression": 0.02},
    }
    registry = ModelRegistry.open(Settings(home=home))
    assert call("train", {**DIGITS, "name": "gated"}).exit_code == 0
    first = call("promote", service)
    assert first.exit_code == 0, first.err
    assert first.result["champion"] is None
    registry.set_alias("gated", "champion", 1, actor="test", reason="good")
    assert call("promote", service).exit_code == 2, "a champion has nothing to prove"

    assert call("train", {**DIGITS, "name": "gated", "steps": 2, "seed": 1}).exit_code == 0
    assert registry.resolve(ModelRef.parse("gated@candidate")).version == 2
    low_bar = {**service, "objective": 0.01}
    for values, reason in ((service, "objective is at least 0.5"), (low_bar, "not shown to be")):
        refused = call("promote", values)
        assert refused.exit_code == 1
        assert refused.err.count("\n") == 1
        assert reason in refused.err
    assert registry.resolve(ModelRef.parse("gated@candidate")).version == 1

    assert call("promote", low_bar, "--force", " ").exit_code == 2, "without a reason"
    assert call("train", DIGITS, "--force", "why").exit_code == 2, "there is nothing to force"
    forced = call("promote", low_bar, "--force", "a rehearsal: it is worse")
    assert forced.exit_code == 0, forced.err
    assert forced.result["forced"] is True
    assert registry.resolve(ModelRef.parse("gated@candidate")).version == 2
    reasons = [change.reason for change in registry.history("gated")]
    assert reasons[-1].startswith(
        "forced: a rehearsal: it is worse; without force it would be refused"
    )


def test_check_estimates_and_starts_nothing(call: Call, home: Path) -> None:
    before = sorted(home.rglob("*"))
    checked = call("train", ROOT / "configs/train/causal_lm.yaml", "--check")
    assert checked.exit_code == 0
    assert "parameters  5,1" in checked.out
    assert "ZeRO 2 over 2" in checked.out
    assert sorted(home.rglob("*")) == before


@pytest.fixture(scope="module")
def demo_base(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the fine-tuning configs go on from: a version called pydoc-lm."""
    directory = save_llama(tmp_path_factory.mktemp("base"), "text")
    import_path(directory, "pydoc-lm", Settings(home=home), say=lambda _line: None)


@pytest.mark.parametrize("config", sorted((ROOT / "configs/train").glob("*.yaml")), ids=str)
def test_every_training_config_passes_its_check(
    call: Call, demo_base: None, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where a job runs
    checked = call("train", config, "--check")
    assert checked.exit_code == 0, checked.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["steps=0"], "key 'steps' is 0: input should be greater than or equal to 1"),
        (["steps=many"], "key 'steps' is 'many'"),
        (["optimizer.learning_rate=-1"], "key 'optimizer.learning_rate' is -1"),
        (["model.family=rnn"], "model"),
        (["data.splits.validation=0"], "data.splits.validation is 0"),
        (["batch_size=9", "micro_batch_size=4"], "micro_batch_size 4 does not divide"),
        (["deepspeed.train_batch_size=7"], "deepspeed.train_batch_size is 7"),
        (["schedule.kind=cosine", "schedule.warmup_steps=99"], "warmup_steps 99 exceeds steps 40"),
        (["data.source.kind=text", "data.source.paths=[nowhere.txt]"], "unknown key"),
        (["name=../up"], "key 'name' is '../up'"),
        (["steps"], "--set 'steps' is not an override"),
    ],
)
def test_bad_configs_are_one_line_and_exit_2(
    call: Call, overrides: list[str], message: str
) -> None:
    found = call("train", DIGITS, "--set", *overrides)
    assert found.exit_code == 2
    assert message in found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1


def test_a_missing_data_file_is_named_by_check(call: Call) -> None:
    data = {"name": "x", "source": {"kind": "text", "paths": ["nowhere.txt"]}}
    for verb, config in (("prepare", data), ("train", {**DIGITS, "data": data})):
        found = call(verb, config, "--check")
        assert found.exit_code == 2
        assert "data file 'nowhere.txt' does not exist" in found.err


def test_a_missing_config_and_a_missing_option(call: Call, tmp_path: Path) -> None:
    assert "does not exist" in call("train", tmp_path / "absent.yaml").err
    found = call("train", DIGITS, "--chekc")
    assert found.exit_code == 2
    assert found.err == (
        "error: unrecognized arguments: --chekc; see python -m jobs.train --help\n"
    )


def test_without_a_cluster_the_way_to_one_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOSTAT_RAY_PORT", "1")
    found = call("train", DIGITS, "--set", "launcher=ray")
    assert found.exit_code == 1
    assert "run `heliostat up`" in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "absent"}, "absent"),
        ({"model": "a b"}, "model reference 'a b' is not valid"),
    ],
)
def test_evaluating_what_is_not_there(call: Call, values: dict[str, Any], message: str) -> None:
    found = call("evaluate", values)
    assert found.exit_code in (1, 2)
    assert message in found.err
    assert found.err.count("\n") == 1
