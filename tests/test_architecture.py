"""The floors and the doors of the house (docs/architecture.md), enforced.

Imports are read from the syntax tree, so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FLOORS = {
    "cluster": set(),
    "jobs": {"cluster"},
    "serve_apps": {"cluster"},
}
# Installed by whoever has GPUs; its own pins would clash with ours.
OPTIONAL = {"vllm"}
# Heavy library → the path prefixes that may import it.
DOORS = {
    "mlflow": ("cluster/tracking.py",),
    "deepspeed": ("jobs/training/",),
    "ray.data": ("jobs/data/ray_execution.py", "jobs/prediction/ray_execution.py"),
    "ray.train": ("jobs/",),
    "ray.tune": ("jobs/",),
    "ray.serve": ("serve_apps/", "cluster/session"),
    "vllm": ("serve_apps/llm/vllm.py",),
    "llguidance": ("cluster/grammars.py",),
    "onnxruntime": ("cluster/runtimes/",),
    "compressed_tensors": ("jobs/compression/weight_only.py",),
    "model_signing": ("cluster/model_package/",),
    "skops": ("cluster/model_package/sklearn_trust.py",),
    "skl2onnx": ("cluster/model_package/sklearn_estimator.py",),
    "tink": ("cluster/model_package/",),
    "sqlalchemy": ("cluster/",),
}
# Modules that every command loads must stay quick to import.
LIGHT = ("cluster", "cluster.settings", "cluster.cli.app", "cluster.model_package")
HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "transformers",
    "deepspeed",
    "pandas",
    "onnxruntime",
    "sklearn",
    "skops",
    "skl2onnx",
)
TOP_LEVEL = {
    "pyproject.toml", "constraints.txt", "Makefile", "README.md", "README.zh-CN.md",
    "CHANGELOG.md", "SECURITY.md", "LICENSE", "cluster", "jobs", "serve_apps", "configs",
    "benchmarks", "docs", "tests", "infra",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports; `from a import b` counts as a.b too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor_and_doors(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    floor = relative.split("/", 1)[0]
    forbidden_floors = set(FLOORS) - FLOORS[floor] - {floor}
    for name in imports_of(path):
        assert name.split(".")[0] not in forbidden_floors, f"{floor} must not import {name}"
        for library, doors in DOORS.items():
            if is_inside(name, library):
                assert relative.startswith(doors), f"{name} may only be imported in {doors}"


def test_only_settings_reads_the_environment() -> None:
    """Ranks are set by a launcher and read where the process group starts."""
    allowed = {"cluster/settings.py"}
    for path in sources():
        relative = path.relative_to(ROOT).as_posix()
        if relative in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
                source = ast.unparse(node)
                if source in {"os.environ", "os.getenv"}:
                    assert relative.startswith("jobs/training/"), (
                        f"{relative}:{node.lineno} reads {source}; take it from Settings"
                    )


def test_only_the_package_knows_what_a_machine_signs_with() -> None:
    """`open_signer` may give a key file, a certificate or a KMS: nobody else may ask which."""
    names = ("LocalSigner", "TrustStore", "PRIVATE_KEY")
    for path in sources():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("cluster/model_package/"):
            continue
        for name in imports_of(path):
            assert name.rpartition(".")[2] not in names, f"{relative} imports {name}"


def test_every_package_that_is_written_can_be_encrypted() -> None:
    """A `write_package` without `keyset=` would stay plain where the operator asked otherwise."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("write_package"):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert "keyset" in {keyword.arg for keyword in node.keywords}, where


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_no_heavy_library(module: str) -> None:
    code = (
        f"import sys, {module}; "
        f"print(' '.join(sorted({set(HEAVY)!r} & {{m.split('.')[0] for m in sys.modules}})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == ""


def test_every_module_says_what_it_is() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)}: no docstring"


def test_the_top_level_holds_what_is_expected_there() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    names = {name.split("/", 1)[0] for name in tracked}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_every_dependency_is_pinned() -> None:
    pinned = {
        canonicalize_name(Requirement(line).name)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    missing = declared_distributions() - pinned - OPTIONAL
    assert not missing, f"not in constraints.txt: {sorted(missing)}"


def test_every_import_is_declared() -> None:
    providers = packages_distributions()
    declared = declared_distributions()
    for path in sources():
        for library in {name.split(".")[0] for name in imports_of(path)}:
            if library in sys.stdlib_module_names or library in FLOORS or library in OPTIONAL:
                continue
            found = {canonicalize_name(name) for name in providers.get(library, ())}
            assert found & declared, f"{path.relative_to(ROOT)} imports {library}: declare it"


def declared_distributions() -> set[str]:
    """Of pyproject.toml, with its extras, in their canonical spelling."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        declared += extra
    return {canonicalize_name(Requirement(text).name) for text in declared}
