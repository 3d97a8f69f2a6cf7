"""Tables: files that are read alike, and cells, columns and labels that are refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.config import parse_config
from cluster.errors import ConfigError, InputError
from jobs.data.cleaning import Cleaned, clean
from jobs.data.config import DataConfig
from jobs.data.preparation import prepare_into, read_source
from jobs.data.splits import split_rows
from jobs.data.tables import Table

HOUSES = "rooms,age,kind,price\n" + "".join(
    f"{n % 5 + 1},{(n * 7) % 30}.5,{'hut' if n % 3 else 'villa'},{n * 10}\n" for n in range(40)
)

Write = Callable[..., DataConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A config of a file with this content."""

    def write(content: str | bytes = HOUSES, name: str = "houses.csv", **values: Any) -> DataConfig:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        table = values.pop("table", {"exclude": ["kind"]})
        source = {"kind": "table", "path": str(path), "target": "price", "task": "regression"}
        splits = values.pop("splits", {"validation": 0.2, "test": 0.2})
        config = {"name": "t", "source": {**source, **values}, "table": table, "splits": splits}
        return parse_config(config, DataConfig, source="test")

    return write


def read(config: DataConfig) -> Table:
    content = read_source(config)
    assert isinstance(content, Table)
    return content


def cleaned(config: DataConfig) -> Cleaned:
    return clean(read(config), config)


def test_csv_parquet_and_text_matrices_hold_the_same_table(write: Write) -> None:
    first = read(write())
    numbers = np.column_stack([first.features, first.target])
    sink = pa.BufferOutputStream()
    columns = dict(zip(("rooms", "age", "price"), numbers.T, strict=True))
    pyarrow.parquet.write_table(pa.table(columns), sink)
    lines = "\n".join(" ".join(map(str, row)) for row in numbers)
    others = [
        write(sink.getvalue().to_pybytes(), "houses.parquet", table={}),
        write(f"# rooms age price\n{lines}", "houses.txt", target=-1, table={}),
        write(f"rooms age price\n{lines}", "named.txt", target="price", table={}),
        write(HOUSES.replace(",", ";"), "semicolons.csv", delimiter=";"),
        write("\ufeff" + HOUSES.replace("\n", "\r\n"), "windows.csv"),
    ]
    for config in others:
        table = read(config)
        assert np.array_equal(table.features, first.features)
        assert np.array_equal(table.target, first.target)


def test_columns_are_chosen_by_name_or_number(write: Write) -> None:
    assert read(write(table={"features": ["age", 0]})).feature_names == ("age", "rooms")
    assert read(write(table={"exclude": [2, "age"]})).feature_names == ("rooms",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "cost"}, r"no column 'cost', it has: rooms, age, kind, price; correct data"),
        ({"target": 9}, r"no column number 9, it has 4"),
        ({"table": {}}, r"houses.csv', line 2, column 'kind': 'villa' is not a number"),
        ({"table": {"features": ["price"]}}, "'price' is the target and cannot be a feature"),
        ({"path": "/nowhere.csv"}, "'/nowhere.csv' does not exist"),
        ({"name": "houses.xlsx"}, r"ends in '.xlsx', expected one of: .csv, .parquet, .txt"),
        ({"content": "a,b\n1,2\n3\n"}, "line 3 has 1 cells, expected 2"),
        ({"content": "rooms,price\n"}, "has no rows"),
        ({"content": ""}, "has no rows"),
        ({"content": "a,a\n1,2\n"}, "two columns named 'a'"),
        ({"content": "a,,c\n1,2,3\n"}, "a column without a name"),
        ({"content": HOUSES.replace("14.5", "1e99")}, "column 'age': '1e99' is not a finite"),
        ({"content": HOUSES.replace("14.5", "inf")}, "column 'age': 'inf' is not a finite"),
        ({"content": HOUSES.replace("14.5", "1_4")}, "column 'age': '1_4' is not a number"),
        ({"content": b"\xff\xfe,1\n"}, "is not UTF-8 text"),
        ({"content": b"PAR1", "name": "x.parquet"}, "is not Parquet"),
        ({"target": "price", "task": "classification", "classes": ["0", "1"]}, "not one of: 0, 1"),
        ({"content": "a,price\n1,0.5\n2,1\n", "task": "classification"}, "no class but a fraction"),
        ({"content": "a,price\n1,x\n2,x\n", "task": "classification"}, "has 1 class"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    write: Write, values: dict[str, Any], message: str
) -> None:
    values.setdefault("table", {} if "content" in values else {"exclude": ["kind"]})
    if str(values.get("content", "")).startswith("rooms,age"):
        values["table"] = {"exclude": ["kind"]}
    with pytest.raises(InputError, match=message) as caught:
        read(write(**values))
    assert "\n" not in str(caught.value)


def test_constant_features_and_absent_classes_are_named(write: Write) -> None:
    constant = "a,b,price\n" + "".join(f"{n},7,{n}\n" for n in range(20))
    with pytest.raises(InputError, match=r"column 'b' is 7 in every training row"):
        cleaned(write(constant, table={}))
    same = "a,price\n" + "".join(f"{n},7\n" for n in range(20))
    with pytest.raises(InputError, match=r"target 'price' is 7 in every training row"):
        cleaned(write(same, table={}))
    rare = "a,price\n" + "".join(f"{n},{n if n < 9 else 0}\n" for n in range(20))
    with pytest.raises(InputError, match=r"no training row has class '\d'.*task: regression"):
        cleaned(write(rare, table={}, task="classification"))


def test_labels_become_class_numbers(write: Write) -> None:
    table = read(write(target="kind", task="classification", table={}))
    assert table.class_names == ("hut", "villa")
    assert table.target[:4].tolist() == [1, 0, 0, 1]
    ordered = read(write(target="kind", task="classification", classes=["villa", "hut"], table={}))
    assert ordered.target[:4].tolist() == [0, 1, 1, 0]


def test_labels_stay_apart_however_long_and_however_written(write: Write) -> None:
    codes = ["9007199254740992", "9007199254740993", "007", "7", "1.0", "1"]
    lines = "\n".join(f"{n},{n % 3},{codes[n % 6]}" for n in range(60))
    table = read(write(f"a,b,code\n{lines}\n", target="code", task="classification", table={}))
    assert set(table.class_names) == {*codes} - {"1.0"}
    config = write(task="classification", classes=["007", "010"])
    with pytest.raises(InputError, match="one of: 007, 010"):
        read(config)


def test_a_target_that_varies_little_for_its_size_loses_nothing(write: Write) -> None:
    """Milliseconds since 1970, say."""
    lines = "\n".join(f"{n % 7},{1_700_000_000_000 + 1000 * (n % 7)}" for n in range(60))
    done = cleaned(write(f"a,price\n{lines}\n", table={}))
    assert done.rows["train"]["target"].dtype == np.float64
    assert np.unique(np.diff(np.unique(done.rows["train"]["target"]))).tolist() == [1000.0]


def test_a_target_too_small_to_tell_is_one_line(write: Write) -> None:
    lines = "\n".join(f"{n},{n}e-300" for n in range(60))
    with pytest.raises(InputError, match="varies by less than numbers can tell"):
        cleaned(write(f"a,price\n{lines}\n", table={}))


def test_an_odd_column_of_parquet_is_no_obstacle(write: Write) -> None:
    rows = 40
    columns = {
        "a": pa.array(range(rows)),
        "price": pa.array([n % 9 + 0.5 for n in range(rows)]),
        "id": pa.array([2**60 + n for n in range(rows)]),
        "big": pa.array([2**63 + n for n in range(rows)], pa.uint64()),
        "at": pa.array([2**62 + n for n in range(rows)], pa.timestamp("us")),
        "tags": pa.array([["x"]] * rows),
    }
    file = BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), file)
    odd = ["id", "big", "at", "tags"]
    config = write(file.getvalue(), name="t.parquet", table={"exclude": odd})
    assert read(config).feature_names == ("a",)
    config = write(file.getvalue(), name="t.parquet", table={"exclude": odd[:3]})
    with pytest.raises(InputError, match=r"column 'tags'.*is not a number"):
        read(config)
    config = write(
        file.getvalue(), name="t.parquet", target="id", task="classification",
        table={"features": ["a"]},
    )  # fmt: skip
    assert len(read(config).class_names) == rows


def test_parquet_with_a_name_twice_is_one_line(write: Write) -> None:
    file = BytesIO()
    pyarrow.parquet.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), file)
    with pytest.raises(InputError, match="two columns named 'a'"):
        read(write(file.getvalue(), name="t.parquet"))


def test_a_pipe_is_no_table(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    config = write(name="other.csv")
    path = str(tmp_path / "pipe.csv")
    source = config.source.model_copy(update={"path": path})
    with pytest.raises(InputError, match="no plain file"):
        read(config.model_copy(update={"source": source}))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"features": ["rooms", 0]}, "stands there twice"),
        ({"features": ["rooms"], "exclude": ["rooms"]}, "in data.table.exclude too"),
    ],
)
def test_a_column_named_for_two_things_is_one_line(
    write: Write, table: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        read(write(table=table))


def with_gaps() -> str:
    """Ages of 8 rows are missing, in several spellings."""
    lines = HOUSES.splitlines()
    for number, spelling in enumerate(("", "NA", "nan", "?", "null", "None", " ", "N/A")):
        row = 1 + 4 * number
        cells = lines[row].split(",")
        lines[row] = ",".join([cells[0], spelling, *cells[2:]])
    return "\n".join(lines)


def test_missing_cells_are_refused_unless_the_config_says_otherwise(write: Write) -> None:
    with pytest.raises(InputError, match=r"line 2, column 'age' is empty \(8 missing in all\)"):
        cleaned(write(with_gaps()))


def test_rows_with_gaps_are_dropped_and_counted(write: Write) -> None:
    whole = cleaned(write())
    found = cleaned(write(with_gaps(), table={"exclude": ["kind"], "missing": "drop"}))
    assert sum(found.info.num_dropped.values()) == 8
    for split, columns in found.rows.items():
        dropped = found.info.num_dropped[split]
        assert len(columns["features"]) == len(whole.rows[split]["features"]) - dropped
    (line,) = found.info.lines()
    assert line.startswith("missing cells 8 (age 8): rows dropped: train ")


@pytest.mark.parametrize(
    ("missing", "average"), [("impute_mean", np.nanmean), ("impute_median", np.nanmedian)]
)
def test_gaps_are_filled_from_the_train_split_alone(
    write: Write, missing: str, average: Callable[[Any], float]
) -> None:
    config = write(with_gaps(), table={"exclude": ["kind"], "missing": missing})
    table = read(config)
    found = clean(table, config)
    raw = table.features[:, 1]
    ids = split_rows(len(raw), config.splits)
    expected = average(raw[ids["train"]])
    for split, columns in found.rows.items():
        ages = np.where(np.isnan(raw[ids[split]]), expected, raw[ids[split]])
        assert np.allclose(columns["features"][:, 1], ages)
    assert found.info.num_missing == {"age": 8}


def test_a_missing_target_is_never_made_up(write: Write) -> None:
    content = HOUSES.replace("hut,10\n", "hut,\n")
    config = write(content, table={"exclude": ["kind"], "missing": "impute_mean"})
    with pytest.raises(InputError, match=r"column 'price' is empty \(1 .*missing_target=drop$"):
        cleaned(config)


def test_rows_without_a_target_may_go_while_features_are_filled(write: Write) -> None:
    content = with_gaps().replace("hut,10\n", "hut,\n")
    table = {"exclude": ["kind"], "missing": "impute_median", "missing_target": "drop"}
    found = cleaned(write(content, table=table))
    assert sum(found.info.num_dropped.values()) == 1
    assert sum(len(columns["features"]) for columns in found.rows.values()) == 39
    (line,) = found.info.lines()
    assert "missing cells 9 (age 8, price 1): median imputed; rows without a target" in line
    refused = write(content, table={"exclude": ["kind"], "missing_target": "drop"})
    with pytest.raises(InputError, match="column 'age' is empty"):
        cleaned(refused)


@pytest.mark.parametrize("outliers", ["keep", "drop", "clip"])
def test_outliers_of_the_train_split_are_treated_and_counted(write: Write, outliers: str) -> None:
    train_ids = np.flatnonzero(
        np.isin(read(write()).target, cleaned(write()).rows["train"]["target"])
    )
    lines = HOUSES.splitlines()
    for row in (int(train_ids[0]), int(train_ids[1])):
        cells = lines[row + 1].split(",")
        lines[row + 1] = ",".join([cells[0], "9999", *cells[2:]])
    table = {"exclude": ["kind"], "outliers": outliers}
    config = write("\n".join(lines), table=table)
    found = cleaned(config)
    assert found.info.num_outliers == {"age": 2}
    assert found.info.num_outlier_rows == 2
    ages = found.rows["train"]["features"][:, 1]
    assert len(ages) == len(train_ids) - (2 if outliers == "drop" else 0)
    assert (ages.max() == 9999) == (outliers == "keep")
    assert found.info.mean[1] == pytest.approx(float(ages.astype(np.float64).mean()))
    (line,) = found.info.lines()
    assert line.startswith("outliers in 2 training rows, 2 (age 2): ")


def test_held_out_rows_do_not_touch_the_statistics(write: Write) -> None:
    first = cleaned(write())
    held_out = first.rows["test"]["target"].tolist()
    lines = HOUSES.splitlines()
    changed = [line.replace(".5,", "9.5,") if float(line.split(",")[3]) in held_out else line
               for line in lines[1:]]  # fmt: skip
    second = cleaned(write("\n".join([lines[0], *changed])))
    assert not np.array_equal(second.rows["test"]["features"], first.rows["test"]["features"])
    assert second.info.mean == first.info.mean
    assert second.info.std == first.info.std


def test_a_split_that_cleaning_empties_is_named(write: Write, tmp_path: Path) -> None:
    config = write(with_gaps(), splits={"validation": 0.2, "test": 0.01})
    with pytest.raises(InputError, match="split 'test' is empty"):
        prepare_into(tmp_path, write(splits={"validation": 0.2, "test": 0.01}), read(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ["a"]}, "'classes' applies to task classification"),
        ({"classes": ["a", "a"], "task": "classification"}, "names a class twice"),
        ({"splits": {"by": "position"}}, "arrays can only be split by row"),
        ({"table": {"missing": "guess"}}, "table.missing"),
    ],
)
def test_a_wrong_table_section_is_one_line(
    write: Write, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        write(**values)
    assert "\n" not in str(caught.value)


def test_table_options_need_a_table() -> None:
    values = {
        "name": "x",
        "source": {"kind": "sklearn", "dataset": "digits"},
        "table": {"missing": "drop"},
    }
    with pytest.raises(ConfigError, match="this source holds images"):
        parse_config(values, DataConfig, source="test")


@pytest.mark.parametrize(
    ("dataset", "num_features", "num_classes"),
    [("diabetes", 10, 0), ("breast_cancer", 30, 2), ("iris", 4, 3), ("wine", 13, 3)],
)
def test_scikit_learns_tables_are_there(dataset: str, num_features: int, num_classes: int) -> None:
    config = parse_config(
        {"name": "x", "source": {"kind": "sklearn", "dataset": dataset}}, DataConfig, source="test"
    )
    found = cleaned(config)
    assert len(found.info.feature_names) == num_features
    assert len(read(config).class_names) == num_classes
