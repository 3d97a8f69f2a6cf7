from pathlib import Path

import pytest

from cluster.errors import MachineError
from cluster.session.scratch import prepare_scratch, remove_temporary_files, scratch_dir

LONGEST = "/h/" + "f" * 56 + "/a.4194304.tmp"


def test_a_short_home_holds_its_own_scratch() -> None:
    assert scratch_dir(Path("/srv/heliostat")) == Path("/srv/heliostat/run")


def test_a_deep_home_gets_a_short_one_of_its_own() -> None:
    one, two = scratch_dir(Path("/srv/" + "a" * 80)), scratch_dir(Path("/srv/" + "b" * 80))
    assert one != two
    assert one == scratch_dir(Path("/srv/" + "a" * 80))


@pytest.mark.parametrize("depth", range(1, 120, 7))
def test_the_longest_socket_path_always_fits(depth: int) -> None:
    assert len(str(scratch_dir(Path("/" + "x" * depth))) + LONGEST) <= 107


def test_it_is_private_and_may_be_prepared_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    prepare_scratch(path)
    prepare_scratch(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o755)
    with pytest.raises(MachineError, match="not a private directory"):
        prepare_scratch(path)


def test_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path = tmp_path / "run"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError):
        prepare_scratch(path)


def test_logs_of_the_last_sessions_stay_and_temporary_files_go(tmp_path: Path) -> None:
    path = tmp_path / "run"
    prepare_scratch(path)
    for day in range(1, 5):
        (path / "ray" / f"session_2026-01-0{day}").mkdir(parents=True)
    prepare_scratch(path)
    remove_temporary_files(path)
    kept = sorted(child.name for child in (path / "ray").iterdir())
    assert kept == ["session_2026-01-03", "session_2026-01-04"]
    assert not (path / "tmp").exists()
