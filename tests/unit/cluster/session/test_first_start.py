from pathlib import Path

from cluster.database import open_database
from cluster.session.first_start import prepare_home


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_home_that_a_database_makes_is_private(tmp_path: Path) -> None:
    open_database(f"sqlite:///{tmp_path}/home/heliostat.db")
    assert mode(tmp_path / "home") == 0o700


def test_a_home_that_was_there_becomes_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    prepare_home(home)
    assert mode(home) == mode(home / "keys") == 0o700
