"""Versions are numbered once, aliases move one at a time, and reading needs no MLflow."""

from __future__ import annotations

import logging
import pickle
import threading
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient

from cluster import database
from cluster.database import deployments, open_database
from cluster.errors import (
    ConflictError,
    InvalidReferenceError,
    NotFoundError,
    NotRunningError,
)
from cluster.garbage import find_garbage
from cluster.model_package import Golden, Kind, Lineage, Manifest, PublishedPackage
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.tracking import RunTracker, open_client


def package(settings: Settings, kind: Kind = "graph", **lineage: str) -> PublishedPackage:
    manifest = Manifest(
        kind=kind,
        name="digits",
        created_at=uuid.uuid4().hex,
        files={},
        golden=Golden(inputs={}, outputs={}),
        metrics={"accuracy": 0.97},
        lineage=Lineage(**lineage),
    )
    location = Path(settings.storage_root) / "packages" / manifest.digest.removeprefix("sha256:")
    location.mkdir(parents=True)
    return PublishedPackage(manifest.digest, str(location), manifest)


@pytest.fixture
def name() -> str:
    """MLflow's server is shared by the tests, so each has its own model."""
    return f"digits-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    return ModelRegistry.open(settings)


def serve_first(settings: Settings, name: str) -> None:
    """Version 1 is the champion that serves."""
    row = {
        "name": name, "version": 1, "digest": "d", "application": "a", "state": "champion",
        "reason": "", "options": {}, "created_at": "", "updated_at": "",
    }  # fmt: skip
    with open_database(settings.database).begin() as connection:
        connection.execute(sa.insert(deployments).values(row))


def move(registry: ModelRegistry, name: str, version: int | None, **options: int) -> None:
    registry.set_alias(name, "champion", version, actor="test", reason="why", **options)


def test_versions_are_numbered_and_the_same_package_is_the_same_version(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    first, second = package(settings), package(settings)
    one = registry.register(name, first)
    two = registry.register(name, second)
    assert (one.version, two.version) == (1, 2)
    assert registry.register(name, first) == one
    assert registry.list_versions(name) == [one, two]
    assert pickle.loads(pickle.dumps(one)) == one


def test_mlflow_shows_what_a_version_is_and_links_its_run(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    with RunTracker.start(settings, "e", "r") as run:
        run.log_dataset("digits", "sha256:da7a", source="/there", context="training")
    parent = package(settings)
    registry.register(f"{name}-base", parent)
    published = package(
        settings, source="jobs.train", run_id=run.run_id, dataset_digest="data", git_commit="abc",
        parent_digest=parent.digest,
    )  # fmt: skip
    registry.register(name, published, run_id=run.run_id)
    client = open_client(settings)
    shown = client.get_model_version(name, "1")
    assert shown.run_id == run.run_id
    page = run.url.partition("/#/")[2]
    for link in (
        f"| run | [`{run.run_id}`](#/{page}) |",
        f"| data | [`data`](#/{page}) |",
        f"| commit | [`abc`](#/{page}) |",
        f"| derived from | [`{parent.digest}`](#/models/{name}-base/versions/1) |",
    ):
        assert link in shown.description
    (used,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", "da7a")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert shown.tags["heliostat.digest"] == published.digest
    assert shown.tags["heliostat.kind"] == "graph"
    assert shown.tags["heliostat.dataset"] == "data"
    assert shown.tags["heliostat.commit"] == "abc"
    assert shown.tags["heliostat.parent"] == parent.digest
    assert published.digest in shown.description
    assert "accuracy" in shown.description


def test_a_run_that_was_deleted_is_no_reason_not_to_register(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings, run_id="gone"), run_id="0" * 32)
    assert "| run | `gone` |" in open_client(settings).get_model_version(name, "1").description


def test_packages_do_not_pass_through_mlflow(
    registry: ModelRegistry, settings: Settings, mlflow_home: Path, name: str
) -> None:
    before = sorted((mlflow_home / "artifacts").rglob("*"))
    published = package(settings)
    (Path(published.location) / "weights").write_bytes(b"w" * 10**6)
    registry.register(name, published)
    assert sorted((mlflow_home / "artifacts").rglob("*")) == before
    source = open_client(settings).get_model_version(name, "1").source
    assert source.removeprefix("heliostat://packages/") == published.digest.removeprefix("sha256:")


def test_an_interrupted_registration_is_finished_not_repeated(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    published = package(settings)
    registry.register(name, published)
    engine = open_database(settings.database)
    with engine.begin() as connection:
        connection.execute(sa.delete(database.model_versions))
    assert registry.register(name, published).version == 1
    assert len(open_client(settings).search_model_versions(f"name = '{name}'")) == 1


def test_a_model_deleted_in_the_mlflow_ui_does_not_reuse_numbers(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    for _ in range(2):
        registry.register(name, package(settings))
    open_client(settings).delete_registered_model(name)
    assert registry.register(name, package(settings)).version == 3


def test_the_same_package_registered_by_many_at_once_is_one_version(
    settings: Settings, name: str
) -> None:
    published = package(settings)
    versions: list[int] = []

    def register() -> None:
        versions.append(ModelRegistry.open(settings).register(name, published).version)

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(versions) == 4
    assert len(set(versions)) == 1
    assert len(ModelRegistry.open(settings).list_versions(name)) == 1


def test_references_resolve_to_versions(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    registry.register(name, package(settings))
    move(registry, name, 2)
    for text in (name, f"{name}@champion", f"{name}/2", f"models:/{name}@champion"):
        found = registry.resolve(ModelRef.parse(text))
        assert (found.version, found.aliases) == (2, ("champion",))


def test_what_does_not_exist_is_named_with_what_does(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    for text, message in (
        ("nothing", f"there are: {name}"),
        (f"{name}/7", "it has versions 1"),
        (name, f"write {name}/1"),
        (f"{name}@shadow", "no alias 'shadow'"),
    ):
        with pytest.raises(NotFoundError, match=message):
            registry.resolve(ModelRef.parse(text))
    with pytest.raises(NotFoundError, match="no version 7"):
        move(registry, name, 7)
    with pytest.raises(NotFoundError):
        registry.history("nothing")


def test_moves_are_remembered_and_mirrored(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    registry.register(name, package(settings))
    for version in (1, 2, 2, None, 1):
        move(registry, name, version)
    moves = [(c.from_version, c.to_version, c.actor, c.reason) for c in registry.history(name)]
    assert moves == [
        (None, 1, "test", "why"),
        (1, 2, "test", "why"),
        (2, None, "test", "why"),
        (None, 1, "test", "why"),
    ]
    shown = open_client(settings).get_registered_model(name)
    assert shown.aliases == {"champion": "1"}
    rows = [row.split(" | ") for row in shown.description.splitlines()[4:]]
    assert [row[1:5] for row in rows] == [
        ["champion", "–", "1", "test"],
        ["champion", "2", "–", "test"],
        ["champion", "1", "2", "test"],
        ["champion", "–", "1", "test"],
    ]
    assert all(row[5] == "why |" for row in rows)


def test_an_alias_moved_in_mlflow_is_noticed_reported_and_moves_nothing(
    registry: ModelRegistry, settings: Settings, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        registry.register(name, package(settings))
    move(registry, name, 1)
    client = open_client(settings)
    assert registry.foreign_edits(name) == []
    client.set_registered_model_alias(name, "champion", "3")
    client.set_registered_model_alias(name, "best", "2")
    assert [str(edit) for edit in registry.foreign_edits(name)] == [
        f"alias 'best' of '{name}' was moved in MLflow from none to version 2",
        f"alias 'champion' of '{name}' was moved in MLflow from version 1 to version 3",
    ]
    assert registry.resolve(ModelRef.parse(name)).version == 1
    with caplog.at_level(logging.WARNING):
        move(registry, name, 2)
    assert caplog.text.count("was moved in MLflow") == 2
    assert client.get_registered_model(name).aliases == {"champion": "2"}
    assert registry.foreign_edits(name) == []
    with open_database(settings.database).connect() as connection:
        targets = connection.scalars(
            sa.select(database.audit_log.c.target).where(
                database.audit_log.c.action == "alias_edited"
            )
        ).all()
    assert sorted(targets) == [f"{name}@best", f"{name}@champion"]


def test_a_mirror_that_breaks_off_is_nobodys_edit(
    registry: ModelRegistry, settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        registry.register(name, package(settings))
    for alias in ("a", "b"):
        registry.set_alias(name, alias, 1, actor="test", reason="why")
    client = open_client(settings)
    real = type(client).set_registered_model_tag
    with monkeypatch.context() as patch:
        told: list[str] = []

        def refuse_the_last(self: MlflowClient, *arguments: str) -> None:
            told.append(arguments[-1])
            if len(told) % 2 == 0:
                raise ConnectionError("gone")
            real(self, *arguments)

        patch.setattr(type(client), "set_registered_model_tag", refuse_the_last)
        for version in (2, 3, None):
            registry.set_alias(name, "a", version, actor="test", reason="why")
            assert registry.foreign_edits(name) == []
    client.set_registered_model_alias(name, "b", "3")
    assert [edit.alias for edit in registry.foreign_edits(name)] == ["b"]
    registry.mirror_aliases(name)
    assert client.get_registered_model(name).aliases == {"b": "1"}
    assert registry.foreign_edits(name) == []


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V20", "a.b"])
def test_what_mlflow_keeps_for_itself_is_no_alias(
    registry: ModelRegistry, settings: Settings, name: str, alias: str
) -> None:
    registry.register(name, package(settings))
    with pytest.raises(InvalidReferenceError, match="is not valid") as caught:
        registry.set_alias(name, alias, 1, actor="test", reason="why")
    assert "\n" not in str(caught.value)
    registry.set_alias(name, "v1-latest", 1, actor="test", reason="why")
    assert open_client(settings).get_registered_model(name).aliases == {"v1-latest": "1"}


def test_a_package_that_is_gone_is_not_listed(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    published = package(settings)
    Path(published.location).rmdir()
    with pytest.raises(ConflictError, match="is not in storage"):
        registry.register(name, published)
    assert registry.list_versions(name) == []
    assert not open_client(settings).search_model_versions(f"name = '{name}'")


def test_a_description_written_in_mlflow_stays_above_a_long_history(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    registry.register(name, package(settings))
    client = open_client(settings)
    client.update_registered_model(name, "Reads digits.\n\nAsk Ada.")
    for number in range(24):
        reason = "why | because\n" * 9
        registry.set_alias(name, "champion", number % 2 + 1, actor="test", reason=reason)
    page = client.get_registered_model(name).description
    assert page.startswith("Reads digits.\n\nAsk Ada.\n\n## Aliases")
    assert page.count("## Aliases") == 1
    assert page.splitlines()[8].startswith("| ")
    assert " | champion | 1 | 2 | test | why / because why" in page.splitlines()[8]
    assert len(page) <= 5000


def test_a_decision_on_an_old_state_is_a_conflict(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    registry.register(name, package(settings))
    move(registry, name, 1, expected_revision=0)
    with pytest.raises(ConflictError, match="moved by somebody else"):
        move(registry, name, 2, expected_revision=0)
    seen = registry.get_alias(name, "champion")
    assert seen is not None
    move(registry, name, 2, expected_revision=seen.revision)
    move(registry, name, None)
    move(registry, name, 1)
    with pytest.raises(ConflictError):
        move(registry, name, 2, expected_revision=seen.revision)
    assert len(registry.history(name)) == 4


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_writers_at_once_one_wins(settings: Settings, name: str, exists: bool) -> None:
    registry = ModelRegistry.open(settings)
    for _ in range(3):
        registry.register(name, package(settings))
    if exists:
        move(registry, name, 1)
    before = registry.get_alias(name, "champion")
    revision = before.revision if before else 0
    barrier = threading.Barrier(2)
    outcomes: list[object] = []

    def write(version: int) -> None:
        barrier.wait()
        try:
            move(registry, name, version, expected_revision=revision)
            outcomes.append(version)
        except ConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=write, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(outcomes) == 2
    assert len(winners) == 1
    after = registry.get_alias(name, "champion")
    assert after is not None
    assert after.version == winners[0]


def test_without_mlflow_reading_works_and_registering_says_why(
    registry: ModelRegistry, settings: Settings, settings_without_server: Settings, name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    known = registry.register(name, package(settings))
    alone = ModelRegistry.open(settings_without_server)
    assert alone.resolve(ModelRef.parse(f"{name}/1")) == known
    assert alone.list_versions() == [known]
    with pytest.raises(NotRunningError, match="heliostat up") as caught:
        alone.register(name, package(settings))
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        move(alone, name, 1)
    assert "not shown in MLflow yet" in caplog.text
    registry.set_alias(name, "candidate", 1, actor="test", reason="later")
    mirrored = open_client(settings).get_registered_model(name).aliases
    assert mirrored == {"champion": "1", "candidate": "1"}


def test_only_what_nobody_uses_is_deleted(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    published = package(settings)
    registry.register(name, published)
    registry.register(f"{name}-too", published)
    move(registry, name, 1)
    with pytest.raises(ConflictError, match="is champion"):
        registry.delete_version(name, 1)
    move(registry, name, None)
    serve_first(settings, name)
    with pytest.raises(ConflictError, match="undeploy"):
        registry.delete_version(name, 1)
    with open_database(settings.database).begin() as connection:
        connection.execute(sa.delete(deployments))
    registry.delete_version(name, 1)
    assert Path(published.location).exists()
    registry.delete_version(f"{name}-too", 1)
    assert not Path(published.location).exists()
    assert registry.list_versions() == []
    assert registry.register(name, package(settings)).version == 2


def test_the_package_that_another_was_derived_from_stays(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    parent = package(settings)
    registry.register(name, parent)
    child = registry.register(name, package(settings, parent_digest=parent.digest))
    registry.delete_version(name, 1)
    assert Path(parent.location).exists()
    assert registry.list_versions(name) == [child]


def test_a_version_that_is_deleted_gets_no_alias(settings: Settings, name: str) -> None:
    """Whoever is first, no alias points to nothing."""
    registry = ModelRegistry.open(settings)
    registry.register(name, package(settings))
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def attempt(what: str) -> None:
        barrier.wait()
        try:
            move(registry, name, 1) if what == "move" else registry.delete_version(name, 1)
            outcomes.append(what)
        except (ConflictError, NotFoundError):
            pass

    threads = [threading.Thread(target=attempt, args=(what,)) for what in ("move", "delete")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert [v.version for v in registry.list_versions(name)] == (
        [1] if outcomes[0] == "move" else []
    )
    assert (registry.get_alias(name, "champion") is not None) == (outcomes[0] == "move")


def test_nothing_is_deleted_while_mlflow_is_down(
    registry: ModelRegistry, settings: Settings, settings_without_server: Settings, name: str
) -> None:
    published = package(settings)
    registry.register(name, published)
    with pytest.raises(NotRunningError):
        ModelRegistry.open(settings_without_server).delete_version(name, 1)
    assert Path(published.location).exists()
    assert len(registry.list_versions(name)) == 1


def test_storage_that_is_down_leaves_the_package_to_be_collected(
    registry: ModelRegistry, settings: Settings, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    published = package(settings)
    (Path(published.location) / "weights").write_bytes(b"w")
    registry.register(name, published)
    blocked = settings.home / "file"
    blocked.touch()
    down = settings.model_copy(update={"storage_url": str(blocked / "storage")})
    with caplog.at_level(logging.WARNING):
        ModelRegistry.open(down).delete_version(name, 1)
    assert "stays until `heliostat gc`" in caplog.text
    assert registry.list_versions(name) == []
    assert [garbage.kind for garbage in find_garbage(settings, older_than_s=0)] == ["package"]


@pytest.mark.parametrize(
    "change", ["UPDATE alias_history SET reason = ''", "DELETE FROM alias_history"]
)
def test_the_history_only_grows(
    registry: ModelRegistry, settings: Settings, name: str, change: str
) -> None:
    registry.register(name, package(settings))
    move(registry, name, 1)
    with (
        pytest.raises(sa.exc.DatabaseError, match="only ever added to"),
        open_database(settings.database).begin() as connection,
    ):
        connection.execute(sa.text(change))
    assert [c.reason for c in registry.history(name)] == ["why"]


def test_an_alias_that_was_removed_has_a_last_target(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    registry.register(name, package(settings))
    registry.register(name, package(settings))
    assert registry.last_target(name, "champion") is None
    move(registry, name, 2)
    move(registry, name, None)
    found = registry.last_target(name, "champion")
    assert found is not None
    assert found.version == 2
    registry.delete_version(name, 2)
    assert registry.last_target(name, "champion") is None


def test_the_base_of_an_adapter_stays_as_long_as_it(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    base = package(settings)
    registry.register(name, base)
    adapter = package(settings, kind="adapter", parent_digest=base.digest)
    registry.register(f"{name}-adapter", adapter)
    with pytest.raises(ConflictError, match=f"{name}/1 is the base of adapter {name}-adapter/1"):
        registry.delete_version(name, 1)
    registry.delete_version(f"{name}-adapter", 1)
    registry.delete_version(name, 1)


def test_the_champion_of_what_is_served_is_moved_by_a_release_alone(
    registry: ModelRegistry, settings: Settings, name: str
) -> None:
    for _ in range(2):
        registry.register(name, package(settings))
    move(registry, name, 1)
    serve_first(settings, name)
    with pytest.raises(ConflictError, match=f"heliostat deploy {name}/2"):
        move(registry, name, 2)
    with pytest.raises(ConflictError, match=f"heliostat undeploy {name}"):
        move(registry, name, None)
    move(registry, name, 1)
    registry.set_alias(name, "other", 2, actor="test", reason="why")
    alias = registry.get_alias(name, "champion")
    assert alias is not None
    assert alias.version == 1
