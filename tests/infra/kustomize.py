"""The part of kustomize that `infra/kubernetes` uses, so that tests need no binary.

`resources`, `namespace`, `images` and JSON6902 `patches`; anything else is refused. Where kubectl
is installed, a test checks that it renders the same.

    objects = render(Path("infra/kubernetes/overlays/dev"))
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Object = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
_WITHOUT_NAMESPACE = {"Namespace"}


def render(directory: Path) -> list[Object]:
    """Every object of a kustomization, patched."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text(encoding="utf-8"))
    unknown = kustomization.keys() - _KNOWN
    assert not unknown, f"{directory}: this renderer does not know {sorted(unknown)}"
    objects = [o for name in kustomization["resources"] for o in _load(directory / name)]
    if namespace := kustomization.get("namespace"):
        for item in objects:
            if item["kind"] not in _WITHOUT_NAMESPACE:
                item["metadata"]["namespace"] = namespace
    for patch in kustomization.get("patches", []):
        _apply(patch, objects)
    for image in kustomization.get("images", []):
        for container in (c for item in objects for c in _containers(item)):
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def render_with_kubectl(directory: Path) -> list[Object]:
    """The same by the real thing."""
    command = ["kubectl", "kustomize", str(directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def renderers() -> list[Callable[[Path], list[Object]]]:
    """Those that this machine can run."""
    return [render, render_with_kubectl] if shutil.which("kubectl") else [render]


def _load(path: Path) -> list[Object]:
    if path.is_dir():
        return render(path)
    documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    # YAML anchors make shared Python objects, which a patch must not change together.
    return json.loads(json.dumps([item for item in documents if item]))


def _apply(patch: Object, objects: list[Object]) -> None:
    target = patch["target"]
    [item] = [
        item
        for item in objects
        if (item["kind"], item["metadata"]["name"]) == (target["kind"], target["name"])
    ]
    jsonpatch.apply_patch(item, yaml.safe_load(patch["patch"]), in_place=True)


def _containers(value: Any) -> Iterator[Object]:
    if isinstance(value, list):
        for item in value:
            yield from _containers(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers"):
                yield from item
            yield from _containers(item)
