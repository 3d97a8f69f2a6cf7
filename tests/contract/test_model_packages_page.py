"""docs/model-packages.md is enough to verify a package by hand, and in another language."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import HeliostatError
from cluster.model_package import SigningKeys, TrustStore, verify_directory
from tests.package_fuzzing import contents_of, mutate_files

ROOT = Path(__file__).parents[2]
V1 = Path(__file__).parent / "v1"
TRUSTED = V1 / "keys/trusted"
VERIFIER = Path(__file__).parent / "verify.mjs"
EXAMPLE = re.compile(r"<!-- run -->\n```bash\n(?P<script>.*?)```\n```text\n(?P<shown>.*?)```", re.S)
MARK = "---- next example ----"
KINDS = ("graph", "language_model", "adapter")
NUM_MUTANTS = 150

for tool in ("node", "jq", "openssl", "xxd"):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed", allow_module_level=True)


def test_every_example_prints_what_stands_under_it() -> None:
    page = (ROOT / "docs/model-packages.md").read_text(encoding="utf-8")
    examples = EXAMPLE.findall(page)
    assert len(examples) == page.count("```bash") > 5
    script = f"echo '{MARK}'\n".join(["set -euo pipefail\n", *(text for text, _ in examples)])
    run = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout.split(f"{MARK}\n")[1:]
    for (text, shown), found in zip(examples, printed, strict=True):
        assert found == shown, text


def by_the_other_verifier(*packages: str | Path, trusted: Path = TRUSTED) -> list[dict[str, Any]]:
    command = ["node", str(VERIFIER), str(trusted), *map(str, packages)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_other_verifier_takes_every_golden_package() -> None:
    ours = [verify_directory(V1 / kind, TrustStore(V1 / "keys")) for kind in KINDS]
    assert by_the_other_verifier(*(V1 / kind for kind in KINDS)) == [
        {"digest": package.digest, "signer": package.signer} for package in ours
    ]


def test_the_other_verifier_has_the_same_words(tmp_path: Path) -> None:
    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(V1 / "graph", tmp_path / name))

    (spoilt("extra file") / "model/extra.json").write_text("{}")
    (spoilt("missing file") / "model/README.md").unlink()
    (spoilt("changed file") / "model/README.md").write_text("x")
    (spoilt("not signed") / "signature.json").unlink()
    (spoilt("forbidden file") / "model/code.py").write_text("")
    (spoilt("bad signature") / "signature.json").write_text("{}")
    names = [path.name for path in sorted(tmp_path.iterdir())]
    found = by_the_other_verifier(*(tmp_path / name for name in names))
    assert [outcome["refused"] for outcome in found] == names
    keys = tmp_path / "keys"
    SigningKeys(keys).ensure_local()
    (unknown,) = by_the_other_verifier(V1 / "graph", trusted=keys / "trusted")
    signer = verify_directory(V1 / "graph", TrustStore(V1 / "keys")).signer
    assert signer is not None
    SigningKeys(keys).revoke(signer, reason="test")
    (revoked,) = by_the_other_verifier(V1 / "graph", trusted=keys / "trusted")
    assert (unknown, revoked) == ({"refused": "unknown key"}, {"refused": "revoked key"})


def test_both_verifiers_judge_tampered_packages_alike(tmp_path: Path) -> None:
    """But where only the signature's own bytes differ: both may read those more or less kindly."""
    trust, mutants, expected = TrustStore(V1 / "keys"), [], []
    for seed in range(NUM_MUTANTS):
        chance = random.Random(seed)
        kind = chance.choice(KINDS)
        (tmp_path / str(seed)).mkdir()
        mutant = Path(shutil.copytree(V1 / kind, tmp_path / str(seed) / "package"))
        mutate_files(mutant, chance)
        if content(mutant) == content(V1 / kind):
            continue
        mutants.append(mutant)
        try:
            expected.append(verify_directory(mutant, trust).digest)
        except HeliostatError:
            expected.append("refused")
    found = by_the_other_verifier(*mutants)
    assert expected.count("refused") > 100
    for mutant, ours, theirs in zip(mutants, expected, found, strict=True):
        assert theirs.get("digest", "refused") == ours, f"seed {mutant.parent.name}: {theirs}"


def content(package: Path) -> dict[str, bytes] | None:
    """What is signed; None where there is something else than plain files."""
    if any(
        path.is_symlink() or not (path.is_file() or path.is_dir()) for path in package.rglob("*")
    ):
        return None
    found = contents_of(package)
    return found if found.pop("signature.json", None) else None
