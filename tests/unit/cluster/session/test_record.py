import threading
from pathlib import Path

from cluster.session.processes import ProcessRecord
from cluster.session.record import (
    RECORD_FILE,
    SessionRecord,
    delete_record,
    locked,
    read_record,
    write_record,
)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    process = ProcessRecord(pid=12, created_at_s=1.5, log_path=tmp_path / "ray.log")
    record = SessionRecord(scratch_dir=tmp_path / "run").with_part("ray", process)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert record.without_part("ray").parts == {}


def test_no_record_and_a_torn_one_are_empty(tmp_path: Path) -> None:
    assert read_record(tmp_path) == SessionRecord()
    (tmp_path / RECORD_FILE).write_text('{"parts": {"ray"')
    assert read_record(tmp_path) == SessionRecord()
    delete_record(tmp_path)
    delete_record(tmp_path)


def test_the_lock_admits_one_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    is_waiting = threading.Event()

    def second() -> None:
        with locked(tmp_path, lambda _: is_waiting.set()):
            order.append("second")

    with locked(tmp_path, order.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert is_waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
