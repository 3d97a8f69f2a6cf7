from pathlib import Path

import pytest

from cluster.session.last_words import last_words


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("starting\nready\n", "ready"),
        ("ValueError: bad port\nshutting down\n", "ValueError: bad port"),
        ('Traceback\n  File "error.py", line 1\nOSError: no space\n\nbye\n', "OSError: no space"),
        ("\x1b[31mConnection refused\x1b[0m\nbye", "Connection refused"),
    ],
)
def test_it_picks_the_line_that_says_why(tmp_path: Path, log: str, expected: str) -> None:
    path = tmp_path / "part.log"
    path.write_text(log)
    assert last_words(path) == expected


def test_a_missing_log_says_nothing(tmp_path: Path) -> None:
    assert last_words(tmp_path / "none.log") == ""
