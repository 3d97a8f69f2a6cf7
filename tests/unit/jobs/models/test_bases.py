"""A base is found by name, path or URL, and refused in one line if it is not safe or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from cluster.errors import HeliostatError, InputError
from cluster.model_package import LocalSigner, ensure_local_key, write_package
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.storage import Storage, open_filesystem
from jobs.models.bases import as_version, find_base


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def llama_dir(language_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(language_model_dir, tmp_path / "llama"))


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("pydoc-lm", "pydoc-lm@champion"),
        ("pydoc-lm@candidate", "pydoc-lm@candidate"),
        ("pydoc-lm/3", "pydoc-lm/3"),
        ("models/llama", "None"),
        ("./pydoc-lm", "None"),
        ("/srv/llama", "None"),
        ("~/3", "None"),
    ],
)
def test_a_name_is_told_from_a_path_by_how_it_is_written(reference: str, version: str) -> None:
    assert str(as_version(reference)) == version


def test_a_directory_is_used_where_it_lies(llama_dir: Path, settings: Settings) -> None:
    (llama_dir / "pytorch_model.bin").write_bytes(b"a pickle beside safetensors is not read")
    base = find_base(str(llama_dir), settings)
    assert (base.directory, base.package) == (llama_dir, None)
    again = find_base(str(llama_dir), settings)
    (llama_dir / "generation_config.json").write_text("{}")
    assert base.digest == again.digest != find_base(str(llama_dir), settings).digest


def test_a_registered_version_is_opened_by_the_verified_reader(
    llama_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_local_key(settings.keys_dir)
    storage = Storage.open(settings.storage_root)
    signer = LocalSigner(settings.keys_dir)
    published = write_package(
        llama_dir, name="m", kind="language_model", storage=storage, signer=signer
    )
    registry = ModelRegistry.open(settings)
    # MLflow numbers versions; this test needs none of it.
    monkeypatch.setattr("cluster.registry.open_client", lambda settings: None)
    monkeypatch.setattr("cluster.registry.number_version", lambda *_, **others: 1)
    registry.register("m", published)
    registry.set_alias("m", "candidate", 1, actor="test", reason="why")
    base = find_base("m@candidate", settings)
    assert (base.reference, base.digest) == ("m/1", published.digest)
    assert base.package is not None
    assert base.directory == base.package.model_dir
    weights = Path(published.location) / "model/model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes() + b"more")
    shutil.rmtree(settings.package_cache_dir)
    with pytest.raises(HeliostatError, match=r"model\.safetensors"):
        find_base("m@candidate", settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "no safetensors weights"),
        ("config.json", None, "no config.json"),
        ("config.json", '{"auto_map": {"AutoModel": "code.X"}}', "'auto_map', which names code"),
        ("adapter_config.json", "{}", "is an adapter"),
        ("model.safetensors", "link", "is a link to"),
    ],
)
def test_what_models_import_refuses_is_no_base(
    llama_dir: Path, settings: Settings, name: str, content: str | None, message: str
) -> None:
    (llama_dir / name).unlink(missing_ok=True)
    if content == "link":
        (llama_dir / name).symlink_to("/etc/hostname")
    elif content is not None:
        (llama_dir / name).write_text(content)
    with pytest.raises(HeliostatError, match=message):
        find_base(str(llama_dir), settings)


def test_a_pickle_alone_is_no_base(llama_dir: Path, settings: Settings) -> None:
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(HeliostatError, match="a pickle, and none in safetensors"):
        find_base(str(llama_dir), settings)


@pytest.mark.parametrize("reference", ["nothing/here", "./nothing", "nothing@champion"])
def test_what_is_not_there_is_named(reference: str, settings: Settings) -> None:
    with pytest.raises(HeliostatError, match=r"^model\.base.*nothing"):
        find_base(reference, settings)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    filesystem, _ = open_filesystem(f"s3://models/{options}&allow_bucket_creation=true")
    filesystem.create_dir("models")
    yield "s3://models/llama" + options
    server.stop()


def test_a_directory_of_an_object_store_is_fetched_once(
    bucket: str, llama_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import fs

    filesystem, path = open_filesystem(bucket)
    (llama_dir / "pytorch_model.bin").write_bytes(b"a pickle stays there")
    fs.copy_files(str(llama_dir), path, destination_filesystem=filesystem)
    base = find_base(bucket, settings)
    assert base.reference == bucket
    assert (base.directory / "model.safetensors").is_file()
    assert not (base.directory / "pytorch_model.bin").exists()

    def fetch_again(*arguments: Any) -> None:
        raise AssertionError("it is there already")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.models.bases._copy", fetch_again)
        assert find_base(bucket, settings) == base
    fs.copy_files(
        str(llama_dir / "config.json"), f"{path}/config.json", destination_filesystem=filesystem
    )
    with filesystem.open_output_stream(f"{path}/generation_config.json") as stream:
        stream.write(b"{}")
    changed = find_base(bucket, settings)
    assert changed.directory != base.directory
    assert changed.digest != base.digest
    with pytest.raises(InputError, match=r"'s3://models/nothing' (holds no files|cannot be read)"):
        find_base(bucket.replace("llama", "nothing"), settings)
