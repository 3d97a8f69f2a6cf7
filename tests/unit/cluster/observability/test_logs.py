import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from cluster.observability.logs import (
    JsonFormatter,
    TextFormatter,
    configure_logging,
    request_id_of_logs,
)


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_holds_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    logging.getLogger("release").info("deployed %s", "数字", extra={"version": 3})
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["logger"]) == ("deployed 数字", "INFO", "release")
    assert line["version"] == 3


def test_configuring_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    logging.getLogger("release").info("deployed", extra={"version": 3})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO release deployed version=3")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_is_written_with_its_event(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("bad weights")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    assert "bad weights" in formatter.format(record)


def test_private_fields_of_others_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    record = logging.makeLogRecord(
        {"name": "release", "msg": "deployed", "levelname": "INFO", "levelno": logging.INFO}
    )
    record._private, record.version = 1, 3
    logging.getLogger("release").handle(record)
    assert capsys.readouterr().err.endswith("INFO release deployed version=3\n")


def test_the_request_id_goes_into_every_line_written_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json")
    token = request_id_of_logs.set("req_1")
    logging.getLogger("gateway").error("unexpected error")
    request_id_of_logs.reset(token)
    logging.getLogger("gateway").error("unexpected error")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["request_id"] == "req_1"
    assert "request_id" not in second


def test_a_replica_writes_past_what_serve_put_in_stderrs_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, serves = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", real)
    monkeypatch.setattr(sys, "stderr", serves)
    configure_logging("json", in_replica=True)
    logging.getLogger("gateway").info("ready")
    assert json.loads(real.getvalue())["event"] == "ready"
    assert not serves.getvalue()
