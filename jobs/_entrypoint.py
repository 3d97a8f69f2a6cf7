"""How every job starts: arguments, config, one-line errors, exit codes.

It knows nothing of what jobs do. The underscore keeps it out of the list of jobs.

    if __name__ == "__main__":
        run_job(TrainConfig, run=train, check=estimate)
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from cluster.config import ConfigType, load_config
from cluster.errors import HeliostatError, StoppedError, UsageError, as_machine_error
from cluster.settings import Settings, load_settings


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: nothing on the way takes it for an error."""


class _Arguments(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see python -m {self.prog} --help")


def run_job(
    config_type: type[ConfigType],
    *,
    verb: str,
    description: str,
    run: Callable[[ConfigType, Settings], None],
    check: Callable[[ConfigType, Settings], None],
) -> NoReturn:
    """Parse the command line, do the job and exit: 0 done, 1 failed, 2 wrong usage, 130 and 143
    interrupted and stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    try:
        arguments = _parse(verb, description, config_type)
        config = load_config(arguments.config, config_type, arguments.overrides)
        action = check if arguments.check else run
        action(config, load_settings())
    except StoppedError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except OSError as error:
        known = as_machine_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        sys.exit(known.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except _Terminated:
        print("stopped; run it again to go on", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
    sys.exit(0)


def _parse(verb: str, description: str, config_type: type[ConfigType]) -> argparse.Namespace:
    parser = _Arguments(prog=f"jobs.{verb}", description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override a value, e.g. --set steps=10 optimizer.learning_rate=1e-3",
    )
    parser.add_argument(
        "--check", action="store_true", help="validate and estimate, then exit; starts nothing"
    )
    if "force" in config_type.model_fields:
        parser.add_argument("--force", metavar="WHY", help="do it all the same, and record why")
    arguments = parser.parse_args()
    if getattr(arguments, "force", None) is not None:
        arguments.overrides.append(f"force={json.dumps(arguments.force)}")
    return arguments


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    # A stopped job ends its run as KILLED and leaves its checkpoints for the next start.
    raise _Terminated
