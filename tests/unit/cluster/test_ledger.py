"""What was used counts once, however often it is handed in."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.database import ledger_entries, metadata, now, open_database
from cluster.ledger import Entry, Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_database(f"sqlite:///{tmp_path / 'ledger.db'}"))


def training(key: str, *, tenant: str = "local", cpu_s: float = 10.0, at: str = "") -> Entry:
    values = {"at": at} if at else {}
    return Entry(
        key=key, tenant=tenant, kind="training", model="m", source="run", cpu_s=cpu_s, **values
    )


def test_an_entry_that_is_handed_in_again_counts_once(ledger: Ledger) -> None:
    assert ledger.record([training("a"), training("b")]) == 2
    assert ledger.record([training("b"), training("c"), training("c")]) == 1
    (total,) = ledger.totals()
    assert (total.num_entries, total.cpu_s) == (3, 30.0)


def test_writers_that_race_with_the_same_entries_count_them_once(ledger: Ledger) -> None:
    entries = [training(f"run/{number}", cpu_s=1.0) for number in range(50)]
    added: list[int] = []
    threads = [
        threading.Thread(target=lambda: added.append(ledger.record(entries))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == [0, 0, 0, 50]
    assert ledger.totals()[0].cpu_s == 50.0


def test_totals_are_by_tenant_kind_and_model(ledger: Ledger) -> None:
    serving = Entry(
        key="request/1",
        tenant="acme",
        kind="completion",
        model="lm",
        source="req-1",
        prompt_tokens=2**40,
        completion_tokens=7,
    )
    ledger.record([training("a"), training("b", tenant="acme"), serving])
    ledger.record([Entry(**{**vars(serving), "key": "request/2", "source": "req-2"})])
    found = [(total.tenant, total.kind, total.model) for total in ledger.totals()]
    assert found == [("acme", "completion", "lm"), ("acme", "training", "m"),
                     ("local", "training", "m")]  # fmt: skip
    completions, trainings = ledger.totals(tenant="acme")
    assert (completions.prompt_tokens, completions.completion_tokens) == (2**41, 14)
    assert trainings.cpu_s == 10.0
    assert [total.num_entries for total in ledger.totals(source="req-2")] == [1]


def test_totals_may_be_apart_by_key_and_version(ledger: Ledger) -> None:
    rows = [("key_1", 1, 5), ("key_1", 2, 7), ("key_2", 2, 1)]
    ledger.record(
        [
            Entry(f"r/{n}", tenant="acme", kind="inference", model="m", source=key,
                  version=version, num_requests=requests)
            for n, (key, version, requests) in enumerate(rows)
        ]
    )  # fmt: skip
    found = ledger.totals(by=("source", "version"))
    assert [(each.source, each.version, each.num_requests) for each in found] == rows
    found = ledger.totals(by=("version",))
    assert [(each.source, each.version, each.num_requests) for each in found] == [
        (None, 1, 5), (None, 2, 8),
    ]  # fmt: skip
    assert [total.num_requests for total in ledger.totals()] == [13]


def test_many_entries_are_taken_at_once(ledger: Ledger) -> None:
    assert ledger.record([training(f"r/{number}") for number in range(3000)]) == 3000


def test_totals_since_a_moment_leave_out_what_was_before(ledger: Ledger) -> None:
    ledger.record([training("old", at="2026-01-01T00:00:00.000+00:00"), training("new")])
    (total,) = ledger.totals(since=datetime(2026, 1, 2, tzinfo=UTC))
    assert total.num_entries == 1


def test_nothing_is_nothing(ledger: Ledger) -> None:
    assert ledger.record([]) == 0
    assert ledger.totals() == []


ROW = st.builds(
    Entry,
    key=st.uuids().map(lambda number: f"gateway/{number}"),
    tenant=st.sampled_from(["acme", "other"]),
    kind=st.sampled_from(["completion", "inference", "training", "prediction"]),
    model=st.sampled_from(["m", "n"]),
    source=st.sampled_from(["key_1", "key_2"]),
    version=st.sampled_from([None, 1, 2]),
    num_requests=st.integers(0, 2**40),
    prompt_tokens=st.integers(0, 2**40),
    completion_tokens=st.integers(0, 2**40),
    cpu_s=st.integers(0, 100).map(float),
    at=st.datetimes(datetime(2020, 11, 1), datetime(2021, 2, 28)).map(
        lambda moment: moment.replace(tzinfo=UTC).isoformat(timespec="milliseconds")
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, max_size=40), st.lists(ROW, max_size=10))
def test_sums_of_old_months_change_no_total(rows: list[Entry], late: list[Entry]) -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    metadata.create_all(engine)
    ledger = Ledger(engine)
    moments = [None, *(datetime(2021, month, 1, tzinfo=UTC) for month in (1, 2, 3))]

    def totals() -> list[object]:
        details = ((), ("version",), ("source", "version"))
        return [
            [replace(total, num_entries=0) for total in ledger.totals(since=since, by=by)]
            for since in moments
            for by in details
        ]

    for more in (rows, late):
        ledger.record(more)
        before = totals()
        for month in ledger.months_to_sum():
            assert ledger.sum_up(month.name) == month.num_entries
        assert totals() == before
        assert ledger.months_to_sum() == []
    with engine.connect() as connection:
        kept = connection.execute(sa.select(ledger_entries)).all()
    summed = [row for row in kept if row.kind in ("completion", "inference")]
    groups = {(r.tenant, r.kind, r.model, r.source, r.version, r.at[:7]) for r in summed}
    assert len(groups) == len(summed)
    engine.dispose()


def test_a_month_is_summed_up_once_it_is_old(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ledger._ROWS_SUMMED_AT_ONCE", 2)
    young = now()
    entries = [
        Entry(f"g/{n}", "acme", "inference", "m", "key_1", num_requests=1, at=at)
        for n, at in enumerate(["2020-01-01T00:00:00.000+00:00"] * 5 + [young] * 3)
    ]
    ledger.record(entries)
    (month,) = ledger.months_to_sum()
    assert (month.name, month.num_entries) == ("2020-01", 5)
    assert ledger.sum_up("2020-01") == 5
    assert ledger.sum_up("2020-01") == 0
    (total,) = ledger.totals()
    assert (total.num_entries, total.num_requests) == (4, 8)
    # From anywhere in the month it is the whole of it.
    (total,) = ledger.totals(since=datetime(2020, 1, 31, 23, tzinfo=UTC))
    assert total.num_requests == 8
