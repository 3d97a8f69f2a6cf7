"""How verbs show model versions: one from its verified package, or two side by side.

print_details({"version": 3, **describe(package)})
print_comparison([first, second], as_json=False)
"""

from __future__ import annotations

from typing import Any

from cluster.cli.output import print_table
from cluster.model_package import ModelPackage
from cluster.processing import public_inputs, public_outputs


def describe(package: ModelPackage) -> dict[str, Any]:
    """What a package says of itself, as plain values."""
    manifest = package.manifest
    model = manifest.language_model
    return {
        "digest": package.digest,
        "signer": package.signer,
        "kind": manifest.kind,
        "made_at": manifest.created_at,
        "lineage": manifest.lineage.model_dump(),
        "language_model": model.model_dump(mode="json") if model else None,
        "inputs": [str(spec) for spec in public_inputs(manifest)],
        "outputs": [str(spec) for spec in public_outputs(manifest)],
        "metrics": manifest.metrics,
        "quantisation": manifest.quantisation,
        "parity": manifest.parity,
        "files": {name: entry.size_bytes for name, entry in sorted(manifest.files.items())},
    }


def print_comparison(versions: list[dict[str, Any]], *, as_json: bool) -> None:
    """Metrics and size of two versions, and the difference of the second to the first."""
    first, second = versions
    labels = [f"{version['name']}/{version['version']}" for version in versions]
    values = [_comparable(version) for version in versions]
    rows = []
    for metric in sorted(values[0].keys() | values[1].keys()):
        a, b = (found.get(metric) for found in values)
        row: dict[str, Any] = {"metric": metric, labels[0]: a, labels[1]: b}
        row["difference"] = b - a if a is not None and b is not None else None
        rows.append(row)
    shown = rows if as_json else [{k: _number(v) for k, v in row.items()} for row in rows]
    columns = ("metric", *dict.fromkeys(labels), "difference")
    print_table(shown, columns, as_json=as_json, empty="neither has metrics")
    datasets = {version["lineage"]["dataset_digest"] for version in (first, second)}
    if len(datasets) > 1 and not as_json:
        print("they were made with different datasets: compare by an evaluation on the same")


def _comparable(version: dict[str, Any]) -> dict[str, float]:
    """By name, what was measured when it was made, by evaluations since then, and its size.

    Evaluations on other data than its own are of other things, so the data is in their names.
    """
    values = {**version["metrics"], "size_mb": sum(version["files"].values()) / 1e6}
    for found in version["evaluations"]:
        data = found["dataset_digest"].removeprefix("sha256:")[:8]
        for metric, value in found["metrics"].items():
            values[f"{found['split']}/{metric} on {data}"] = value
    return values


def _number(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def print_details(details: dict[str, Any]) -> None:
    """Nested values below their name; what is empty is left out."""
    for name, value in details.items():
        label = name.replace("_", " ")
        if name == "evaluations":
            for found in value:
                print(f"evaluated on {found['split']} of {found['dataset_digest']}:")
                for metric, number in found["metrics"].items():
                    print(f"  {metric}: {_number(number)}")
        elif isinstance(value, dict):
            filled = {key: item for key, item in value.items() if item not in ("", None)}
            if filled:
                print(f"{label}:")
                for key, item in filled.items():
                    if name == "files":
                        print(f"  {key}: {item:,} bytes")
                    else:
                        print(f"  {key.replace('_', ' ')}: {item}")
        elif isinstance(value, list):
            if value:
                print(f"{label}: {', '.join(str(item) for item in value)}")
        elif value not in ("", None):
            print(f"{label}: {value}")
