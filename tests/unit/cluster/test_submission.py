import subprocess
from pathlib import Path

import pytest

from cluster.errors import ConfigError, UsageError
from cluster.submission import check_config, check_verb, git_commit, known_jobs


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    for name in ("train.py", "prepare.py", "__init__.py", "_entrypoint.py"):
        (tmp_path / "jobs" / name).write_text("raise SystemExit('imported')")
    return tmp_path


def test_jobs_are_the_files_of_the_directory_and_are_not_imported(checkout: Path) -> None:
    assert known_jobs(checkout) == ["prepare", "train"]


@pytest.mark.parametrize("verb", ["tain", "_entrypoint", "../evil", "data.rows", ""])
def test_anything_else_is_refused_with_the_list(checkout: Path, verb: str) -> None:
    check_verb("train", checkout)
    with pytest.raises(UsageError, match="prepare, train"):
        check_verb(verb, checkout)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        check_config(tmp_path / "none.yaml")


def test_the_commit_says_whether_files_differ_from_it(checkout: Path) -> None:
    assert git_commit(checkout) == ""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", checkout, *identity, *arguments], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = git_commit(checkout)
    assert len(clean) == 40
    (checkout / "jobs" / "train.py").write_text("")
    assert git_commit(checkout) == f"{clean}-dirty"
