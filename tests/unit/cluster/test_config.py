import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field, model_validator

from cluster.config import StrictModel, load_config
from cluster.errors import ConfigError


class Optimizer(StrictModel):
    name: str = "adamw"
    learning_rate: float = Field(1e-3, gt=0)


class Config(StrictModel):
    steps: int = 10
    optimizer: Optimizer = Optimizer()
    files: tuple[str, ...] = ()


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Config, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_yaml_states_only_deviations(write) -> None:
    config = load_config(write("optimizer: {learning_rate: 0.5}"), Config)
    assert config == Config(optimizer=Optimizer(learning_rate=0.5))
    assert load_config(write(""), Config) == Config()


def test_overrides_reach_nested_keys_and_are_yaml(write) -> None:
    config = load_config(
        write("steps: 3"), Config, ["optimizer.learning_rate=1e-1", "files=[a, b]", "steps=7"]
    )
    assert (config.steps, config.optimizer.learning_rate, config.files) == (7, 0.1, ("a", "b"))


def test_an_unknown_key_is_named_with_the_nearest_known_one(write) -> None:
    message = failure(write("optimizer: {lerning_rate: 1}"))
    assert "optimizer.lerning_rate" in message
    assert "did you mean 'learning_rate'" in message


def test_an_unknown_key_unlike_any_other_lists_what_there_is(write) -> None:
    assert "expected one of: files, optimizer, steps" in failure(write("zzz: 1"))


def test_a_wrong_type_shows_the_value(write) -> None:
    message = failure(write("steps: many"))
    assert "'steps' is 'many'" in message
    assert "integer" in message


class Range(StrictModel):
    low: int
    high: int

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


class Circle(StrictModel):
    kind: Literal["circle"]
    radius: float


class Square(StrictModel):
    kind: Literal["square"]
    width: float = Field(gt=0)

    @model_validator(mode="after")
    def _small(self) -> "Square":
        if self.width > 9:
            raise ValueError(f"width {self.width:g} is above 9")
        return self


class Drawing(StrictModel):
    shape: Annotated[Circle | Square, Field(discriminator="kind")]
    layers: tuple[str | int, ...] = ()
    name: Annotated[str, AfterValidator(lambda value: value)] = ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shape: {kind: square, widht: 1}", "unknown key 'shape.widht'; did you mean 'width'"),
        ("shape: {kind: square, zzz: 1}", "expected one of: kind, width"),
        ("shape: {kind: square}", "key 'shape.width' is missing"),
        ("shape: {kind: square, width: -1}", "key 'shape.width' is -1"),
        ("shape: {kind: square, width: 10}", "key 'shape': width 10 is above 9"),
        ("{shape: {kind: circle, radius: 1}, layers: [a, [b]]}", "key 'layers.1'"),
        ("{shape: {kind: circle, radius: 1}, name: [1]}", "key 'name'"),
    ],
)
def test_a_path_has_only_keys_that_were_written(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), Drawing)
    assert message in str(caught.value)


def test_a_check_of_ours_speaks_for_itself(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write("{low: 2, high: 1}"), Range)
    assert "low 2 is not below high 1" in str(caught.value)
    assert "value error" not in str(caught.value).lower()


def test_a_missing_file_lists_its_neighbours(write) -> None:
    path = write("")
    assert "config.yaml" in failure(path.with_name("confg.yaml"))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "a: b: c"])
def test_broken_yaml_is_one_line(write, text: str) -> None:
    failure(write(text))


def test_a_binary_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    failure(path)


def test_a_directory_is_one_line(tmp_path: Path) -> None:
    failure(tmp_path)


@pytest.mark.parametrize("override", ["steps", "=1", "a..b=1", "steps.x=1", "steps=[1"])
def test_a_malformed_override_is_one_line(write, override: str) -> None:
    assert override in failure(write("steps: 1"), override)


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "steps: " + "9" * 5000, "a: " + "[" * 3000 + "]" * 3000, "1: 2", "~: 2"],
    ids=["no date", "digits", "deep", "number for a key", "nothing for a key"],
)
def test_yaml_that_its_parser_chokes_on_is_one_line(write, text: str) -> None:
    assert len(failure(write(text))) < 500


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps: 1\nsteps: 2", "at line 2: the key 'steps' is given twice"),
        ("optimizer: {learning_rate: .inf}", "'optimizer.learning_rate' is inf"),
        ("optimizer: {learning_rate: '1e999'}", "'optimizer.learning_rate' is inf"),
        ("steps: 123456789012345678901234567890", "more than 64 bits"),
        ('files: ["a\\0b"]', "no text"),
        ('files: ["\\ud800"]', "no text"),
        ("files: [!!binary aGk=]", "binary"),
        ("a: &a [*a]", "nested too deeply"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "\n".join(
                f"{n}: &{n} [{','.join(['*' + p] * 10)}]"
                for p, n in zip("abcdef", "bcdefg", strict=True)
            ),
            "more than 100,000 values",
        ),
    ],
)
def test_what_no_config_has_a_use_for_is_refused_with_its_reason(
    write, text: str, reason: str
) -> None:
    assert reason in failure(write(text))


def test_a_date_is_text(write) -> None:
    assert load_config(write("files: [2001-12-14]"), Config).files == ("2001-12-14",)


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no plain file" in failure(tmp_path / "pipe.yaml")


def test_an_override_that_the_parser_chokes_on_is_one_short_line(write) -> None:
    message = failure(write(""), "steps=" + "[" * 3000 + "]" * 3000)
    assert "is not valid YAML" in message
    assert len(message) < 500


def test_an_override_that_is_no_finite_number_is_said_to_be_that(write) -> None:
    assert "cannot be taken: it is nan, expected a finite number" in failure(write(""), "rate=.nan")


def test_true_is_not_a_number(write) -> None:
    assert "'steps' is true, expected a number" in failure(write("steps: yes"))
    message = failure(write(""), "optimizer.learning_rate=false")
    assert "key 'optimizer': 'learning_rate' is false" in message


def test_a_long_wrong_value_is_cut(write) -> None:
    assert len(failure(write("steps: " + "x" * 10_000))) < 500
