"""Jobs of configs in the checkout, on the settings' cluster.

jobs = RayTrainingJobs(settings)
jobs.start("retrain-digits-4f1c", "train", "configs/train/digits.yaml")
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.settings import Settings
from cluster.submission import Jobs, JobState


class RayTrainingJobs:
    """See `serve_apps.release.retraining.TrainingJobs`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self, job_id: str, verb: str, config: str, overrides: Sequence[str] = ()) -> None:
        path = self._settings.source_dir / config
        Jobs.connect(self._settings).submit_once(verb, path, overrides, job_id=job_id)

    def state(self, job_id: str) -> JobState:
        return Jobs.connect(self._settings).state(job_id)
