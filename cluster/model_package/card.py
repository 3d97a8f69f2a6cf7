"""A package in words, for people: the description and the tags of its version in MLflow.

Pure text from the manifest; knows nothing of MLflow.

    model_card(digest, manifest, CardLinks(run="#/experiments/1/runs/abc"))     # Markdown
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from cluster.model_package.manifest import Manifest
from cluster.processing import public_inputs, public_outputs

MAX_CHARACTERS = 5_000
"""What MLflow's database keeps of a description."""
_MAX_FILES = 20


@dataclass(frozen=True)
class CardLinks:
    """Pages of what a version came from; empty where there is none."""

    run: str = ""
    """It also shows the dataset and the commit."""
    parent: str = ""


def version_tags(digest: str, manifest: Manifest, location: str) -> dict[str, str]:
    """What a version is and where it came from; empty values are left out."""
    lineage = manifest.lineage
    tags = {
        "digest": digest,
        "kind": manifest.kind,
        "location": location,
        "source": lineage.source,
        "dataset": lineage.dataset_digest,
        "commit": lineage.git_commit,
        "parent": lineage.parent_digest,
        "sweep": lineage.sweep_run_id,
        "job": lineage.job_id,
    }
    return {f"heliostat.{name}": value for name, value in tags.items() if value}


def model_card(
    digest: str,
    manifest: Manifest,
    links: CardLinks = CardLinks(),
    *,
    ref: str = "",
) -> str:
    """Markdown for the version's page; `ref` is NAME/VERSION, where that is known already."""
    sections = [
        f"# {manifest.name}",
        _facts(digest, manifest, links),
        _interface(manifest),
        _table("Metrics", ("metric", "value"), [(n, f"{v:.6g}") for n, v in _metrics(manifest)]),
        _plain("Quantisation", manifest.quantisation),
        _plain("Parity with what it was derived from", manifest.parity),
        _table(
            "Files",
            ("file", "bytes"),
            [(n, str(e.size_bytes)) for n, e in sorted(manifest.files.items())[:_MAX_FILES]],
        ),
        f"Check it offline with `heliostat models verify {ref or f'{manifest.name}/VERSION'}`.",
    ]
    return "\n\n".join(section for section in sections if section)[:MAX_CHARACTERS]


def _facts(digest: str, manifest: Manifest, links: CardLinks) -> str:
    lineage = manifest.lineage
    rows = [
        ("digest", f"`{digest}`"),
        ("kind", manifest.kind),
        ("made", f"{manifest.created_at} by {lineage.source or 'an unknown tool'}"),
        ("run", _linked(lineage.run_id, links.run)),
        ("data", _linked(lineage.dataset_digest, links.run)),
        ("commit", _linked(lineage.git_commit, links.run)),
        ("adapts", _linked(manifest.adapter.base_digest, links.parent) if manifest.adapter else ""),
        ("derived from", _linked(lineage.parent_digest, links.parent)),
    ]
    if info := manifest.language_model:
        rows += [
            ("architecture", info.architecture),
            ("parameters", f"{info.num_parameters:,}"),
            ("context", f"{info.max_context_tokens:,} tokens"),
        ]
    return _table("", ("", ""), [row for row in rows if row[1]])


def _linked(identity: str, page: str) -> str:
    """An identity as code, leading to its page if it has one; empty if there is none."""
    if not identity:
        return ""
    return f"[`{identity}`]({page})" if page else f"`{identity}`"


def _interface(manifest: Manifest) -> str:
    if manifest.kind != "graph":
        return ""
    rows = [("takes", f"`{spec}`") for spec in public_inputs(manifest)]
    rows += [("gives", f"`{spec}`") for spec in public_outputs(manifest)]
    return _table("Interface", ("", "tensor"), rows)


def _metrics(manifest: Manifest) -> list[tuple[str, float]]:
    return sorted(manifest.metrics.items())


def _plain(title: str, values: Mapping[str, JsonValue]) -> str:
    rows = [(name.replace("_", " "), _cell(value)) for name, value in sorted(values.items())]
    return _table(title, ("", ""), rows)


def _cell(value: JsonValue) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(title: str, heads: tuple[str, ...], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}\n"] if title else []
    lines += [_row(heads), _row(("---",) * len(heads)), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
