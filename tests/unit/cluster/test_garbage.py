"""What nothing refers to goes; what is listed, served, parent of a listed one, or young stays."""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster import database
from cluster.batches import Batch, BatchStore
from cluster.database import deployments, model_versions, open_database, tenant_files
from cluster.garbage import find_garbage, remove
from cluster.ledger import Entry, Ledger
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tenant_files import TenantFiles

DAY_S = 86_400.0


@pytest.fixture(params=["folder", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "folder":
        return Settings(home=tmp_path)
    root: str = request.getfixturevalue("s3_root")
    url = root.replace("/root?", f"/{uuid.uuid4().hex}?")
    return Settings(home=tmp_path, storage_url=url)


def publish(settings: Settings, tmp_path: Path, content: str) -> str:
    """A package of that content; its digest."""
    source = tmp_path / f"source-{content}"
    (source / "model").mkdir(parents=True)
    (source / "manifest.json").write_text(content)
    (source / "model" / "weights").write_bytes(b"w" * 1000)
    digest = content * 64
    Storage.open(settings.storage_root).put_dir(source, f"packages/{digest[:64]}")
    return digest[:64]


def list_version(settings: Settings, version: int, digest: str, parent: str = "") -> None:
    row = {
        "name": "m",
        "version": version,
        "digest": f"sha256:{digest}",
        "location": "somewhere",
        "kind": "graph",
        "parent_digest": f"sha256:{parent}" if parent else None,
        "created_at": database.now(),
    }
    with open_database(settings.database).begin() as connection:
        connection.execute(sa.insert(model_versions).values(row))


def deploy(settings: Settings, digest: str) -> None:
    row = {
        "name": "m",
        "version": 9,
        "digest": f"sha256:{digest}",
        "application": "m.v9",
        "state": "champion",
        "reason": "",
        "options": {},
        "created_at": database.now(),
        "updated_at": database.now(),
    }
    with open_database(settings.database).begin() as connection:
        connection.execute(sa.insert(deployments).values(row))


def test_only_packages_that_nothing_refers_to_are_found(settings: Settings, tmp_path: Path) -> None:
    listed, parent, served, lost = (publish(settings, tmp_path, name) for name in "abcd")
    list_version(settings, 1, listed, parent)
    deploy(settings, served)
    (found,) = find_garbage(settings, older_than_s=0)
    assert (found.kind, found.key) == ("package", f"packages/{lost}")
    assert found.size_bytes == 1001
    assert remove(found, settings)
    assert find_garbage(settings, older_than_s=0) == []
    storage = Storage.open(settings.storage_root)
    assert [storage.exists(f"packages/{d}") for d in (listed, parent, served, lost)] == [
        True, True, True, False,
    ]  # fmt: skip


def test_what_is_young_or_published_again_stays(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    digest = publish(settings, tmp_path, "a")
    assert find_garbage(settings, older_than_s=DAY_S) == []
    package = Path(settings.storage_root) / "packages" / digest
    for path in package.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY_S,) * 2)
    assert len(find_garbage(settings, older_than_s=DAY_S)) == 1
    assert not Storage.open(settings.storage_root).put_dir(package, f"packages/{digest}")
    assert find_garbage(settings, older_than_s=DAY_S) == []


def test_what_is_listed_after_it_was_found_stays(settings: Settings, tmp_path: Path) -> None:
    digest = publish(settings, tmp_path, "a")
    (found,) = find_garbage(settings, older_than_s=0)
    list_version(settings, 1, digest)
    assert not remove(found, settings)
    assert Storage.open(settings.storage_root).exists(f"packages/{digest}")


def test_what_is_published_again_after_it_was_found_stays(
    settings: Settings, tmp_path: Path
) -> None:
    digest = publish(settings, tmp_path, "a")
    (found,) = find_garbage(settings, older_than_s=0)
    storage = Storage.open(settings.storage_root)
    time.sleep(1.1 - time.time() % 1)  # an object store's dates are of whole seconds
    assert not storage.put_dir(tmp_path / "source-a", f"packages/{digest}")
    assert not remove(found, settings)
    assert storage.exists(f"packages/{digest}")


def test_what_a_killed_writer_left_is_found(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    stage = Path(settings.storage_root) / ".staging" / "stage-x"
    stage.mkdir(parents=True)
    (stage / "half").write_bytes(b"h" * 10)
    (found,) = find_garbage(settings, older_than_s=0)
    assert (found.kind, found.size_bytes) == ("staging", 10)
    assert remove(found, settings)
    assert not stage.exists()


def test_checkpoints_go_only_when_their_run_is_finished_and_at_rest(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for name, state in (("done", {"result": {"version": 1}}), ("open", {"result": None})):
        step = tmp_path / "runs" / name / "checkpoints" / "step-1"
        step.mkdir(parents=True)
        (step / "state").write_bytes(b"s" * 100)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(state))
    (found,) = find_garbage(settings, older_than_s=0)
    assert (found.kind, found.key) == ("checkpoints", "runs/done/checkpoints")
    with (tmp_path / "runs/done/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not remove(found, settings), "a training holds the run"
    assert remove(found, settings)
    assert not (tmp_path / "runs/done/checkpoints").exists()
    assert (tmp_path / "runs/open/checkpoints").exists()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_checkpoints_elsewhere_go_with_their_run_and_nobody_elses(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    location = str(tmp_path / "elsewhere")
    if kind == "s3":
        root: str = request.getfixturevalue("s3_root")
        location = root.replace("/root?", f"/{uuid.uuid4().hex}?")
    storage = Storage.open(location)
    for name, result in (("done", {"version": 1}), ("open", None)):
        for step in (1, 2):
            storage.write_bytes(f"{name}-da7a/step-{step}/state", b"s" * 100)
        run = tmp_path / "home" / "runs" / name
        run.mkdir(parents=True)
        state = {"checkpoint_location": location, "checkpoint_name": f"{name}-da7a"}
        (run / "run.json").write_text(json.dumps({**state, "result": result}))
    settings = Settings(home=tmp_path / "home")
    assert find_garbage(settings, older_than_s=DAY_S) == []
    (found,) = find_garbage(settings, older_than_s=0)
    assert (found.kind, found.size_bytes) == ("checkpoints", 200)
    assert found.key == storage.path("done-da7a")
    assert "test:test" not in found.key
    assert remove(found, settings)
    assert storage.list() == ["open-da7a/step-1/state", "open-da7a/step-2/state"]
    assert find_garbage(settings, older_than_s=0) == []


def test_checkpoints_that_cannot_be_reached_do_not_stop_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(home=tmp_path)
    publish(settings, tmp_path, "a")
    (tmp_path / "file").touch()
    run = tmp_path / "runs" / "done"
    run.mkdir(parents=True)
    state = {"checkpoint_location": str(tmp_path / "file" / "x"), "checkpoint_name": "done-da7a"}
    (run / "run.json").write_text(json.dumps({**state, "result": {"version": 1}}))
    assert [found.kind for found in find_garbage(settings, older_than_s=0)] == ["package"]
    assert "checkpoints of run done are left alone" in caplog.text


def age(settings: Settings, file_id: str, days: float) -> None:
    created_at = database.later(-days * DAY_S)
    with open_database(settings.database).begin() as connection:
        itself = tenant_files.c.id == file_id
        connection.execute(sa.update(tenant_files).where(itself).values(created_at=created_at))


def add_batch(settings: Settings, batch_id: str, input_file_id: str, status: Any) -> BatchStore:
    store = BatchStore(open_database(settings.database))
    values = ("acme", "key_1", "/v1/embeddings", "m", "m/1", input_file_id, status)
    store.add(Batch(batch_id, *values))
    return store


def test_old_files_and_broken_uploads_go_and_those_of_batches_under_way_stay(
    settings: Settings,
) -> None:
    storage = Storage.open(settings.storage_root)
    files = TenantFiles(open_database(settings.database), storage)
    old, used, young = (files.add("acme", n, "batch", [b"12345"]) for n in ("old", "used", "young"))
    storage.write_bytes("files/acme/file-lost", b"1234567")
    for file, days in ((old, 31), (used, 31), (young, 29)):
        age(settings, file.id, days)
    add_batch(settings, "batch_1", used.id, "in_progress")
    found = {each.key: each for each in find_garbage(settings, older_than_s=0)}
    assert sorted(found) == sorted([old.key, "files/acme/file-lost"])
    assert {each.kind for each in found.values()} == {"file"}
    assert [found[key].size_bytes for key in (old.key, "files/acme/file-lost")] == [5, 7]
    assert [each.key for each in find_garbage(settings, older_than_s=DAY_S)] == [old.key]
    assert all(remove(each, settings) for each in found.values())
    assert storage.list("files") == sorted([used.key, young.key])
    assert {file.id for file in files.list("acme")} == {used.id, young.id}
    assert find_garbage(settings, older_than_s=0) == []


def test_a_file_that_is_wanted_after_it_was_found_stays(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    storage = Storage.open(settings.storage_root)
    files = TenantFiles(open_database(settings.database), storage)
    file = files.add("acme", "old", "batch", [b"12345"])
    age(settings, file.id, 31)
    storage.write_bytes("files/acme/file-lost", b"1234567")
    lost, expired = sorted(
        find_garbage(settings, older_than_s=0), key=lambda each: each.key != "files/acme/file-lost"
    )
    add_batch(settings, "batch_1", file.id, "validating")
    files.add("acme", "again", "batch_output", [b"1"], file_id="file-lost")
    assert not remove(expired, settings)
    assert not remove(lost, settings)
    assert len(storage.list("files")) == 2


def test_the_work_of_ended_batches_goes(settings: Settings) -> None:
    storage = Storage.open(settings.storage_root)
    for name in ("batch_active", "batch_ended", "batch_unknown"):
        storage.write_bytes(f"batches/{name}/input.jsonl", b"{}")
    add_batch(settings, "batch_active", "file-1", "finalizing")
    store = add_batch(settings, "batch_ended", "file-1", "finalizing")
    store.change(store.get("acme", "batch_ended"), status="completed")
    found = find_garbage(settings, older_than_s=0)
    assert [(each.kind, each.key) for each in found] == [
        ("batch", "batches/batch_ended"), ("batch", "batches/batch_unknown"),
    ]  # fmt: skip
    add_batch(settings, "batch_unknown", "file-1", "validating")
    assert [remove(each, settings) for each in found] == [True, False]
    assert storage.list("batches") == [
        "batches/batch_active/input.jsonl", "batches/batch_unknown/input.jsonl",
    ]  # fmt: skip


def test_old_usage_becomes_sums(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    ledger = Ledger(open_database(settings.database))
    for n in range(3):
        entry = Entry(f"g/{n}", "acme", "completion", "m", "key_1", completion_tokens=5)
        ledger.record([replace(entry, at="2020-01-15T00:00:00.000+00:00")])
    (found,) = find_garbage(settings, older_than_s=DAY_S)
    assert (found.kind, found.key) == ("usage", "ledger/2020-01")
    assert remove(found, settings)
    (total,) = ledger.totals()
    assert (total.num_entries, total.completion_tokens) == (1, 15)
    assert find_garbage(settings, older_than_s=0) == []
