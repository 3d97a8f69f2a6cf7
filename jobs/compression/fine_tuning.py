"""A candidate's training: an ordinary run of jobs.train, whose model is registered by nobody.

train = Trainer(dataset, settings, run_id)
outcome = train(train_config, stage)
outcome.exported.directory
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.settings import Settings
from jobs.data.dataset import Dataset
from jobs.train import (
    SweepLink,
    begin,
    check_config,
    find_commit,
    make_launcher,
    peaks_path,
    tracked,
)
from jobs.training.config import TrainConfig
from jobs.training.following import followed
from jobs.training.run_directory import RunDirectory
from jobs.training.worker import Outcome, WorkerJob


@dataclass(frozen=True)
class Trainer:
    """Trains on one dataset, in runs below that of the compression."""

    dataset: Dataset
    settings: Settings
    run_id: str
    """MLflow run of the compression."""

    def __call__(self, config: TrainConfig, directory: Path) -> Outcome:
        """Train in a directory that goes with the compression; raises HeliostatError if it
        fails."""
        launcher = make_launcher(config, self.settings)
        deepspeed_config = check_config(config, launcher.world_size)
        facts = {
            **launcher.check(),
            "git_commit": find_commit(self.settings),
            "dataset_digest": self.dataset.info.digest,
        }
        link = SweepLink(self.run_id, {"job": "compress"})
        with RunDirectory(directory).locked() as run:
            state = begin(run, config, self.dataset)
            with (
                tracked(
                    config, self.settings, deepspeed_config, launcher, facts, state, link
                ) as tracker,
                followed(
                    config, self.settings, self.dataset, run, state.driven(tracker.run_id), tracker
                ) as sink,
            ):
                job = WorkerJob(
                    config,
                    self.dataset.directory,
                    run.path,
                    compiled_dir=self.settings.home / "cache" / "compiled",
                    peaks_path=peaks_path(self.settings),
                )
                return launcher.run(job, sink)
