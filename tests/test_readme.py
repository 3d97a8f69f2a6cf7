"""README is a promise: every command in it runs.

Each shell or Python block in README.md is preceded by one of
    <!-- run -->                    run here, in order, in one session against the running stack
    <!-- run in tests/FILE.py -->   run by that test, on a stack of its own
README.zh-CN.md holds the same blocks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.stack import Stack

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(?:<!-- (?P<tag>run[^>]*) -->\n)?```(?P<language>bash|python)\n(?P<body>.*?)```", re.DOTALL
)


def blocks(path: Path) -> list[tuple[str | None, str, str]]:
    """(tag, language, body) of every shell or Python block."""
    text = path.read_text(encoding="utf-8")
    return [(m["tag"], m["language"], m["body"]) for m in BLOCK.finditer(text)]


def as_shell(language: str, body: str) -> str:
    if language == "bash":
        return body
    return f"python - <<'END_OF_BLOCK'\n{body}END_OF_BLOCK\n"


def test_every_block_says_where_it_runs() -> None:
    for tag, _, body in blocks(README):
        assert tag is not None, f"this block of README.md has no tag:\n{body}"
        if tag != "run":
            where = ROOT / tag.removeprefix("run in ")
            assert where.is_file(), f"README.md names {where}, which does not exist"


def test_the_chinese_readme_has_the_same_commands() -> None:
    def commands(path: Path) -> list[str]:
        return [re.sub(r"\s*#.*", "", body) for _, _, body in blocks(path)]

    assert commands(README) == commands(ROOT / "README.zh-CN.md")


@pytest.mark.stack
def test_the_blocks_run(stack: Stack, tmp_path: Path, language_model_dir: Path) -> None:
    """One shell, from a directory that looks like the checkout and holds a model of one's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-model").symlink_to(language_model_dir)
    script = "set -euo pipefail\n" + "\n".join(
        as_shell(language, body) for tag, language, body in blocks(README) if tag == "run"
    )
    run = stack.run_shell(script, cwd=tmp_path)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"


def test_every_verb_named_in_the_docs_exists() -> None:
    """`heliostat …` in any document names a command or group that the CLI has."""
    from typer.main import get_command

    from cluster.cli.app import app

    root = get_command(app)
    documents = [README, ROOT / "README.zh-CN.md", ROOT / "SECURITY.md", *ROOT.glob("docs/*.md")]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for words in re.findall(r"(?:^\s*|`|\$\(|─ )heliostat ((?:[a-z]+ ?)+)", text, re.MULTILINE):
            _assert_command_exists(root, words.split(), document)


def _assert_command_exists(root: object, words: list[str], document: Path) -> None:
    group = root
    for word in words:
        commands = getattr(group, "commands", None)
        if not commands:
            return
        assert word in commands, f"{document.name}: `heliostat {' '.join(words)}`: no '{word}'"
        group = commands[word]
