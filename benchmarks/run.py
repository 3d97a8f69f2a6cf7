"""Run one benchmark by name, or all: `python -m benchmarks.run [NAME]`.

A benchmark is a module of this package with `measure() -> tuple[Row, ...]`. The last line printed
is its result as one JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys

from benchmarks.report import make_report, write_report

BENCHMARKS = (
    "package_verify",
    "train_throughput",
    "time_to_loss",
    "checkpoint_stall",
    "goodput",
    "overload",
    "gateway",
    "llm_engine",
    "release",
)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        known = ", ".join(BENCHMARKS)
        print(f"error: there is no benchmark '{unknown[0]}'; there are: {known}", file=sys.stderr)
        return 2
    for name in names or BENCHMARKS:
        report = make_report(name, importlib.import_module(f"benchmarks.{name}").measure())
        write_report(report)
        print(json.dumps(report.model_dump(mode="json")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
