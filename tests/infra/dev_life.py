"""The whole life of the dev environment on a local AWS: apply, plan again, look, destroy.

A program for the background: of its three minutes and more the AWS provider sleeps 80 s after
creating a database and 60 s after deleting one. It writes down what it saw and judges nothing.

    program = start(directory)
    program.wait(DEADLINE_S)
    life = Life.read(directory)
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aws_state import AwsState, client, count, look
from background import BackgroundProgram, end_with_the_tests
from terraform_runner import STATE_BUCKET, TerraformRoot, local_aws

DEADLINE_S = 600
_RESULT_FILE = "life.json"
_STATE_KEY = "heliostat/dev.tfstate"


@dataclass(frozen=True)
class Life:
    """What was seen of it."""

    aws: AwsState
    """While it lived."""
    outputs: dict[str, Any]
    state: str
    """Terraform's state file."""
    second_plan_status: int
    """0: nothing to change; 2: something; 1: it failed."""
    second_plan: str
    living: dict[str, int]
    """How many there were of each kind, and how many the destruction left."""
    left: dict[str, int]

    @classmethod
    def read(cls, directory: Path) -> Life:
        values = json.loads((directory / _RESULT_FILE).read_text(encoding="utf-8"))
        return cls(**{**values, "aws": AwsState(**values["aws"])})

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), default=str)  # answers hold times
        (directory / _RESULT_FILE).write_text(text, encoding="utf-8")


def start(directory: Path) -> BackgroundProgram:
    return BackgroundProgram(Path(__file__), str(directory), log=directory / "life.log")


def live(directory: Path) -> Life:
    """All of it, in a few minutes.

    Raises:
        AssertionError: Terraform refused to apply or to destroy, in its own words.
    """
    with local_aws(directory / "moto.log") as url:
        root = TerraformRoot.copy_of("dev", directory / "terraform", url)
        root.adapt_to_moto()
        root.init()
        _say("apply")
        root.run("apply", "-auto-approve", "-parallelism=30")
        _say("second plan")
        second = root.run("plan", "-detailed-exitcode", expected=None)
        _say("look")
        aws = look(url, except_buckets=(STATE_BUCKET,))
        outputs = json.loads(root.run("output", "-json").stdout)["platform"]["value"]
        state = client(url, "s3").get_object(Bucket=STATE_BUCKET, Key=_STATE_KEY)["Body"].read()
        living = count(url, except_buckets=(STATE_BUCKET,))
        _say("destroy")
        root.run("destroy", "-auto-approve", "-parallelism=30")
        left = count(url, except_buckets=(STATE_BUCKET,))
    _say("done")
    return Life(
        aws=aws,
        outputs=outputs,
        state=state.decode(),
        second_plan_status=second.returncode,
        second_plan=f"{second.stdout}\n{second.stderr}",
        living=living,
        left=left,
    )


def _say(step: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step}", flush=True)


def main() -> None:
    end_with_the_tests()
    directory = Path(sys.argv[1])
    live(directory).write(directory)


if __name__ == "__main__":
    main()
