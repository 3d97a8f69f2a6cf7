"""`submit` and `jobs`: training and everything else that ends by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.submission import Jobs

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

jobs_app = typer.Typer(help="Submitted jobs.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command()(submit)
    app.add_typer(jobs_app, name="jobs")


def submit(
    job: Annotated[str, typer.Argument(help="prepare, train, evaluate, …: a file in jobs/.")],
    config: Annotated[Path, typer.Option(help="The job's YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: a.b=value; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Show its output and end as it ends.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Only validate the config, here.")] = False,
) -> None:
    """Run a job on the cluster; exit code 0 if it succeeds, 1 if it fails."""
    from cluster.submission import check_config, check_verb

    settings = load_settings()
    check_verb(job, settings.source_dir)
    check_config(config)
    if check:
        raise typer.Exit(_check(job, config, overrides or []))
    jobs = _connect()
    job_id = jobs.submit(job, config, overrides or [])
    if not wait:
        print(job_id)
        return
    _follow(jobs, job_id)
    jobs.require_success(job_id)


@jobs_app.command("list")
def list_jobs(as_json: JsonOption = False) -> None:
    """Every submitted job, newest first."""
    from cluster.cli.output import print_table

    rows = [vars(job) for job in _connect().list()]
    columns = ("id", "status", "started_at", "ended_at")
    print_table(rows, columns, as_json=as_json, empty="no jobs; `heliostat submit` starts one")


@jobs_app.command("logs")
def logs(
    job_id: Annotated[str, typer.Argument(help="An id from `jobs list`.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """What a job has printed."""
    jobs = _connect()
    if follow:
        _follow(jobs, job_id)
    else:
        print(jobs.logs(job_id), end="")


@jobs_app.command("stop")
def stop(job_id: Annotated[str, typer.Argument(help="An id from `jobs list`.")]) -> None:
    """End a running job."""
    print(f"stopping {job_id}" if _connect().stop(job_id) else f"{job_id} had ended already")


def _check(job: str, config: Path, overrides: list[str]) -> int:
    import subprocess
    import sys

    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", f"jobs.{job}", "--config", str(config), *settings, "--check"]
    return subprocess.run(command, check=False).returncode


def _connect() -> Jobs:
    from cluster.submission import Jobs

    return Jobs.connect(load_settings())


def _follow(jobs: Jobs, job_id: str) -> None:
    try:
        print(f"job {job_id}", flush=True)
        for text in jobs.follow(job_id):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(
            f"\njob {job_id} runs on; watch it with `heliostat jobs logs -f {job_id}`, "
            f"end it with `heliostat jobs stop {job_id}`"
        )
        raise typer.Exit(1) from None
