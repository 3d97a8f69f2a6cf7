"""How verbs print where a package came from."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.lineage import Link


def print_lineage(links: Iterable[Link]) -> None:
    """One line a link, as it is found; those of a parent are indented below it."""
    for link in links:
        what = "  " * (link.depth + 1) + link.what
        line = f"{what:<12} {link.state:<9} {link.identity}"
        print(f"{line.rstrip()}  ({link.note})", flush=True)
