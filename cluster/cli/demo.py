"""`heliostat demo`: the whole life of two models on this machine, as their users would live it.

It runs the commands and calls the HTTP routes that users do and knows no shortcut. A training that
is finished already is not repeated.
"""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.errors import HeliostatError, JobFailedError
from cluster.model_ref import CANDIDATE, CHAMPION, ModelRef
from cluster.settings import Settings, load_settings

if TYPE_CHECKING:
    import httpx

    from cluster.registry import ModelRegistry, ModelVersion

NUM_DIGITS = 10
PROMPT = "The import statement"

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class DemoModel:
    """A model of the demo, the config that trains it, and what `--fast` overrides in it."""

    name: str
    config: str
    fast: tuple[str, ...]


DIGITS = DemoModel("digits", "configs/train/digits.yaml", fast=())
LANGUAGE_MODEL = DemoModel("pydoc-lm", "configs/train/causal_lm.yaml", fast=("steps=40",))


def run_demo(*, fast: bool = False) -> None:
    """Start the cluster, train, deploy and call both models, print where everything is.

    Args:
        fast: train the language model for a few steps only, to see the plumbing.

    Raises:
        JobFailedError: one of the commands ended badly; it has said why.
    """
    from cluster.registry import ModelRegistry

    started = time.monotonic()
    step("Start the cluster")
    heliostat("up")
    settings = load_settings()
    registry = ModelRegistry.open(settings)
    for model in (DIGITS, LANGUAGE_MODEL):
        step(f"Train {model.name}: Ray Train + DeepSpeed on two workers")
        version = _train(registry, model, fast=fast)
        step(f"Deploy {version.name}, version {version.version}")
        heliostat("deploy", f"{version.name}/{version.version}")
    with _customer(settings) as customer:
        step("Ask as a customer: ten handwritten digits that training never saw")
        _ask_digits(customer, settings, registry)
        step("Ask as a customer: continue a sentence")
        _ask_language_model(customer, settings, registry)
    step("Where the answers came from: verified from the package down to data and commit")
    for model in (DIGITS, LANGUAGE_MODEL):
        print_origin(settings, registry, model.name)
    console.print(f"\nThe demo took {time.monotonic() - started:.0f} s.\n")
    heliostat("up")  # it is up; this prints the card


def step(title: str) -> None:
    """A headline."""
    console.print(f"\n[bold cyan]── {title}[/bold cyan]")


def heliostat(*arguments: str) -> None:
    """Run a command of the CLI; JobFailedError if it fails."""
    command = [sys.executable, "-m", "cluster.cli.app", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise JobFailedError(
            f"`heliostat {' '.join(arguments)}` failed", hint="its message stands above"
        )


def _train(registry: ModelRegistry, model: DemoModel, *, fast: bool) -> ModelVersion:
    overrides = ("resume=reuse", *(model.fast if fast else ()))
    options = [part for override in overrides for part in ("--set", override)]
    heliostat("submit", "train", "--config", model.config, *options)
    return registry.resolve(ModelRef(model.name, alias=CANDIDATE))


def _customer(settings: Settings) -> httpx.Client:
    import httpx

    key = settings.api_key_path.read_text(encoding="ascii").strip()
    return httpx.Client(
        base_url=settings.gateway_url, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


def _call(customer: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = customer.post(path, json=body)
    if answer.status_code != 200:
        raise HeliostatError(f"{path} answered {answer.status_code}: {answer.text[:300]}")
    values: dict[str, Any] = answer.json()
    return values


def _ask_digits(customer: httpx.Client, settings: Settings, registry: ModelRegistry) -> None:
    manifest = _manifest(settings, registry, DIGITS)
    pixels, labels = held_out_digits(settings, manifest.lineage.dataset_digest, NUM_DIGITS)
    numbers = {
        "name": "pixels",
        "datatype": "FP32",
        "shape": [len(pixels), 64],
        "data": pixels.reshape(-1).tolist(),
    }
    answer = _call(customer, f"/v2/models/{DIGITS.name}/infer", {"inputs": [numbers]})
    from_numbers = _output(answer, "label")
    pictures = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(pixels)],
        "data": [base64.b64encode(_png(image)).decode("ascii") for image in pixels],
    }
    answer = _call(customer, f"/v2/models/{DIGITS.name}/infer", {"inputs": [pictures]})
    _print_digits(labels, from_numbers, _output(answer, "label"))
    console.print(
        f"accuracy on all held-out digits: {manifest.metrics['test/accuracy']:.1%} "
        f"(F1 {manifest.metrics['test/f1']:.3f})"
    )


def _print_digits(labels: list[str], from_numbers: list[str], from_pictures: list[str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_row("written", *labels)
    table.add_row("answered, from numbers", *from_numbers)
    table.add_row("answered, from PNG pictures", *from_pictures)
    console.print(table)


def _ask_language_model(
    customer: httpx.Client, settings: Settings, registry: ModelRegistry
) -> None:
    manifest = _manifest(settings, registry, LANGUAGE_MODEL)
    body = {
        "model": LANGUAGE_MODEL.name, "prompt": PROMPT, "max_tokens": 60,
        "temperature": 0.7, "seed": 1, "stream": True,
    }  # fmt: skip
    console.print(f"[bold]{PROMPT}[/bold]", end="")
    for text in _stream(customer, body):
        console.print(text, end="", markup=False)
    console.print(
        f"\n\nvalidation loss {manifest.metrics['validation/loss']:.2f} nats/token; guessing by "
        f"token frequency alone gives {manifest.profile['unigram_entropy']:.2f}. A model this "
        "small only shows the plumbing."
    )


def _stream(customer: httpx.Client, body: dict[str, Any]) -> Any:
    import json

    with customer.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise HeliostatError(
                f"/v1/completions answered {answer.status_code}: {answer.read().decode()[:300]}"
            )
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                yield from (choice["text"] for choice in json.loads(data)["choices"])


def print_origin(settings: Settings, registry: ModelRegistry, name: str) -> None:
    """The verified lineage of the version that has a model's traffic."""
    from cluster.cli.lineage import print_lineage
    from cluster.lineage import trace
    from cluster.model_package import open_version

    version = registry.resolve(ModelRef(name, alias=CHAMPION))
    console.print(f"[bold]{version.ref}[/bold]")
    print_lineage(trace(open_version(version, settings), settings))


def _manifest(settings: Settings, registry: ModelRegistry, model: DemoModel) -> Any:
    return manifest_of(settings, registry.resolve(ModelRef(model.name, alias=CANDIDATE)))


def manifest_of(settings: Settings, version: ModelVersion) -> Any:
    """What a version's verified package says of itself."""
    from cluster.model_package import open_version

    return open_version(version, settings).manifest


def held_out_digits(
    settings: Settings, dataset_digest: str, most: int | None = None
) -> tuple[Any, list[str]]:
    """The first rows of the test split: float32 pixels (row, 8, 8), 0 to 16, and their labels."""
    import numpy as np
    import pyarrow as pa

    from cluster.storage import Storage

    key = f"datasets/{DIGITS.name}/{dataset_digest.removeprefix('sha256:')}/test.arrow"
    stored = Storage.open(settings.storage_root).read_bytes(key)
    rows = pa.ipc.open_file(pa.BufferReader(stored)).read_all().slice(0, most)
    pixels = np.array(rows["pixels"].to_pylist(), dtype=np.float32).reshape(-1, 8, 8)
    return pixels, [str(label) for (label,) in rows["label"].to_pylist()]


def _png(image: Any) -> bytes:
    """An 8 × 8 picture, white ink on black as in the data set."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _output(answer: dict[str, Any], name: str) -> list[str]:
    (values,) = (output["data"] for output in answer["outputs"] if output["name"] == name)
    return [str(value) for value in values]
