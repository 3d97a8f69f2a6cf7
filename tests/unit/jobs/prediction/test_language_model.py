"""Prompts are continued as in serving: the same text, however they are batched."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from cluster.model_package import ModelPackage, open_version
from cluster.model_ref import ModelRef
from cluster.processing.text import TextProcessor
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from serve_apps.llm.continuous_batching import CacheBudget, ContinuousBatchingEngine
from serve_apps.llm.engine import EngineRequest, Sampling
from tests.unit.jobs.prediction.conftest import (
    Predict,
    contents,
    read_errors,
    read_rows,
    write_lines,
)

ROOT = Path(__file__).parents[4]
CHAT = [{"role": "user", "content": "hello <end>"}]


def open_talker(settings: Settings) -> ModelPackage:
    return open_version(ModelRegistry.open(settings).resolve(ModelRef.parse("talker/1")), settings)


def served_text(package: ModelPackage, prompts: list[list[int]], **sampling: Any) -> list[str]:
    """What the serving engine and its detokenizer make of prompts."""
    text = TextProcessor.load(package.model_dir)
    info = package.manifest.language_model
    assert info is not None
    engine = ContinuousBatchingEngine.load(
        package.model_dir, CacheBudget(max_cache_bytes=2**20, max_running=4, max_batch_tokens=64)
    )
    options = Sampling(eos_token_ids=info.eos_token_ids, **sampling)
    tokens: dict[str, list[int]] = {}
    try:
        for number, prompt in enumerate(prompts):
            engine.add(EngineRequest(str(number), tuple(prompt), options))
            tokens[str(number)] = []
        num_open = len(prompts)
        while num_open:
            for output in engine.step():
                ends = output.finish_reason is not None
                ids = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
                tokens[output.request_id].extend(ids)
                num_open -= ends
    finally:
        engine.close()
    return [text.decode(ids) for ids in tokens.values()]


def test_the_text_is_that_of_serving(run: Predict, settings: Settings, tmp_path: Path) -> None:
    package = open_talker(settings)
    text = TextProcessor.load(package.model_dir)
    rows = [{"prompt": "Once upon"}, {"prompt": [5, 6, 7, 8]}, {"messages": CHAT}]
    ids = [text.encode("Once upon"), [5, 6, 7, 8], text.encode_chat(CHAT)]
    for number, sampling in enumerate(
        (
            {"temperature": 0},
            {"temperature": 0.9, "top_k": 40, "seed": 11},
            {"temperature": 0.9, "min_p": 0.01, "frequency_penalty": 1.5, "seed": -1},
        )
    ):
        output = tmp_path / f"out-{number}"
        asked = [{**row, **sampling, "max_tokens": 12} for row in rows]
        run("talker/1", write_lines(tmp_path / "in.jsonl", asked), output)
        found = read_rows(output)
        assert [row["text"] for row in found] == served_text(
            package, ids, max_tokens=12, **sampling
        )
        assert [row["prompt_tokens"] for row in found] == [len(each) for each in ids]
        for row in found:
            assert (row["completion_tokens"] == 12) == (row["finish_reason"] == "length")


def test_a_row_draws_alike_in_any_batch_and_otherwise_than_its_neighbour(
    run: Predict, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "Once"}] * 5)
    options = {"generation": {"max_tokens": 8, "temperature": 1.0, "seed": 3}}
    found = [
        [row["text"] for row in read_rows(run("talker/1", source, tmp_path / str(size),
                                              batch_size=size, **options))]
        for size in (1, 2, 5)
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 5


def test_stop_strings_lengths_and_bad_prompts(run: Predict, tmp_path: Path) -> None:
    first = run(
        "talker/1", write_lines(tmp_path / "a.jsonl", [{"prompt": "Once", "seed": 5,
        "temperature": 1.0, "max_tokens": 20}]), tmp_path / "a",
    )  # fmt: skip
    whole = read_rows(first)[0]["text"]
    stop = whole[3:5]
    rows: list[Any] = [
        {"prompt": "Once", "seed": 5, "temperature": 1.0, "max_tokens": 20, "stop": stop},
        {"prompt": "x", "max_tokens": 3},
        {"prompt": "x" * 200},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "messages": CHAT},
        {"prompt": ""},
        {"messages": [{"role": "user"}]},
        {"prompt": [999]},
        {"prompt": {"text": "x"}},
        {"text": "x"},
    ]
    output = run("talker/1", write_lines(tmp_path / "b.jsonl", rows), tmp_path / "b")
    stopped, short = read_rows(output)
    assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert (short["completion_tokens"], short["finish_reason"]) == (3, "length")
    reasons = [error["reason"] for error in read_errors(output)]
    wanted = [
        "but the model holds 128", "temperature", "both a prompt and messages", "no tokens",
        "'role' and 'content'", "not in the vocabulary", "neither text nor token ids", "no prompt",
    ]  # fmt: skip
    for reason, part in zip(reasons, wanted, strict=True):
        assert part in reason


def test_a_killed_job_goes_on_and_its_output_is_the_same_to_the_byte(
    run: Predict, settings: Settings, tmp_path: Path
) -> None:
    rows: list[Any] = [{"prompt": f"Once upon {n}", "temperature": n % 2} for n in range(40)]
    rows[7] = "oops"
    source = write_lines(tmp_path / "in.jsonl", rows)
    values = {"rows_per_part": 2, "batch_size": 2, "generation": {"max_tokens": 32}}
    killed = tmp_path / "killed"
    config = {"model": "talker/1", "input": str(source), "output": str(killed), **values}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.predict", "--config", str(path)],
        cwd=ROOT,
        env={
            **os.environ,
            "HELIOSTAT_HOME": str(settings.home),
            "HELIOSTAT_MLFLOW_TRACKING_URI": settings.tracking_uri,
            "HELIOSTAT_RAY_PORT": "1",
        },
    )
    while not (killed / "parts" / "00002.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name: path.stat().st_mtime_ns for path in (killed / "parts").glob("*.json")}
    assert 3 <= len(left) < 20
    assert not (killed / "errors.jsonl").exists()

    run("talker/1", source, killed, **values)
    assert {n: (killed / "parts" / n).stat().st_mtime_ns for n in left} == left
    whole = run("talker/1", source, tmp_path / "whole", **values)
    assert contents(killed) == contents(whole)
    assert [row["row"] for row in read_rows(killed)] == [n for n in range(1, 41) if n != 8]


def test_answers_are_held_to_a_schema_or_an_expression(run: Predict, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    hard = "(((a{1000}){1000}){1000})"
    rows: list[Any] = [
        {"prompt": "Once", "json_schema": json.dumps(schema)},
        {"prompt": "Once", "regex": "(sun|moon){2}"},
        {"prompt": "Once", "max_tokens": 4},
        {"prompt": "Once", "regex": "(a"},
        {"prompt": "Once", "regex": "a", "json_schema": "{}"},
        {"prompt": "Once", "regex": hard},
    ]
    options = {"generation": {"temperature": 1.5, "max_tokens": 60, "seed": 2}}
    output = run("talker/1", write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", **options)
    held, matched, free = read_rows(output)
    jsonschema.validate(json.loads(held["text"]), schema)
    assert re.fullmatch("(sun|moon){2}", matched["text"])
    assert (matched["finish_reason"], free["completion_tokens"]) == ("stop", 4)
    reasons = [error["reason"] for error in read_errors(output)]
    wanted = ["unclosed group", "both a json_schema and a regex", "expression is refused"]
    for reason, part in zip(reasons, wanted, strict=True):
        assert part in reason
