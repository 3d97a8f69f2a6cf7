"""Whole releases simulated: bad versions are rolled back within a number of requests, good ones are
not, and what decides it is in the reason."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from cluster.deployments import Strategy
from cluster.release_evidence import Evidence
from cluster.statistics.sequential import Sample
from serve_apps.release.decisions import Decision
from serve_apps.release.options import ReleaseOptions
from tests.simulated_release import POLICY, Model, Release, observe, row


@pytest.mark.parametrize(
    ("what", "candidate", "most_served", "most_requests"),
    [
        ("wrong answers", Model(differs=0.2), 100, 2000),
        ("wrong answers", Model(differs=0.5), 15, 300),
        ("errors", Model(errors=0.2), 30, 600),
        ("crashing", Model(errors=1.0), 10, 100),
        ("NaN in half of the answers", Model(errors=0.5), 15, 300),
        ("three times as slow", Model(slow=0.9), 10, 200),
    ],
)
@pytest.mark.parametrize("strategy", ["shadow", "canary"])
def test_a_bad_version_is_rolled_back_within_a_number_of_requests(
    strategy: Strategy, what: str, candidate: Model, most_served: int, most_requests: int
) -> None:
    """Served: customers' requests that a bad version answers. In shadow there are none."""
    for seed in range(10):
        release = Release(strategy, candidate, seed, look=20)
        decision = release.run()
        assert decision.action == "roll_back", what
        assert release.num_requests <= most_requests, (what, seed, decision.reason)
        assert release.num_served <= (0 if strategy == "shadow" else most_served), (what, seed)


def test_of_200_releases_of_the_same_model_no_more_than_alpha_are_rolled_back() -> None:
    rolled_back = 0
    for seed in range(200):
        strategy: Strategy = "shadow" if seed % 2 else "canary"
        release = Release(strategy, Model(differs=0.02), seed, look=1500)
        rolled_back += release.run().action == "roll_back"
    assert rolled_back <= ReleaseOptions().alpha * 200


@pytest.mark.parametrize("strategy", ["shadow", "canary"])
def test_a_better_version_becomes_champion(strategy: Strategy) -> None:
    for seed in range(5):
        release = Release(strategy, Model(errors=0.0, slow=0.01, differs=0.03), seed, look=500)
        decision = release.run()
        assert decision.action == "promote", decision.reason
        assert release.row.step == (4 if strategy == "shadow" else 3)
        assert release.num_requests <= 30_000
        assert "no worse in" in decision.reason


def test_without_a_champion_there_is_nothing_to_compare_with() -> None:
    decision = POLICY.begin(row("shadow"), has_champion=False, reason="it answers")
    assert decision == Decision("promote", "it answers; there is no champion to compare it with")
    assert POLICY.begin(row("direct"), has_champion=True, reason="ok") == Decision("promote", "ok")


def test_phases_follow_each_other_with_the_shares_that_are_asked_for() -> None:
    asked = {"steps": [0.1, 0.6], "mirror_share": 0.5, "min_observations": 1}
    good: Evidence = {
        ("candidate", "errors"): Sample(2000, 0.0),
        ("champion", "errors"): Sample(2000, 0.0),
        ("pair", "label_disagreement"): Sample(500, 0.0),
    }
    seen = []
    found = row("shadow", asked)
    decision = POLICY.begin(found, has_champion=True, reason="it answers")
    while decision.action == "compare":
        seen.append((decision.state, decision.share, decision.mirror_share))
        assert decision.state is not None
        found = replace(found, state=decision.state, step=found.step + 1, share=decision.share)
        decision = POLICY.decide(observe(found, good))
    assert seen == [("shadow", 0.0, 0.5), ("canary", 0.1, 0.5), ("canary", 0.6, 0.5)]
    assert (decision.action, decision.reason) == (
        "promote",
        "canary 60%: no worse in 2000 requests: errors 0.0% of 2000, the champion's 0.0% of 2000, "
        "margin 2%; label disagreement 0.0% of 500, limit 10%",
    )


UNMIRRORED: Evidence = {
    ("candidate", "errors"): Sample(3000, 0),
    ("champion", "errors"): Sample(3000, 0),
}
GOOD: Evidence = UNMIRRORED | {("pair", "label_disagreement"): Sample(500, 0)}
BAD: Evidence = {("candidate", "errors"): Sample(60, 30), ("champion", "errors"): Sample(3000, 0)}
FEW: Evidence = {("candidate", "errors"): Sample(20, 0), ("champion", "errors"): Sample(300, 0)}
SOME: Evidence = {("candidate", "errors"): Sample(120, 1), ("champion", "errors"): Sample(300, 0)}


@pytest.mark.parametrize(
    ("evidence", "release", "seconds", "action", "words"),
    [
        ({}, {}, 0, "wait", "no requests"),
        (GOOD, {}, 0, "compare", "no worse in 3000 requests"),
        (UNMIRRORED, {}, 0, "wait", "3000 requests, no answers compared yet"),
        (UNMIRRORED, {}, 9999, "compare", "nothing decided within"),
        (GOOD, {"min_observations": 5000}, 0, "wait", "3000 requests so far|no worse"),
        (BAD, {}, 0, "roll_back", "errors 50.0% of 60, the champion's 0.0% of 3000"),
        (BAD, {}, 9999, "roll_back", "worse"),
        (FEW, {}, 0, "wait", "20 requests so far"),
        (FEW, {}, 9999, "wait", "nothing decided within 3600 s.*at least 100 are needed"),
        (FEW, {"without_traffic": "promote"}, 9999, "compare", "nothing decided within"),
        (FEW, {"without_traffic": "roll_back"}, 9999, "roll_back", "nothing decided within"),
        (SOME, {}, 3599, "wait", "120 requests so far"),
        (SOME, {"max_duration_s": 60}, 61, "compare", "nothing decided within 60 s"),
    ],
)
def test_a_phase_ends_by_its_evidence_or_its_time(
    evidence: Evidence, release: dict[str, Any], seconds: float, action: str, words: str
) -> None:
    found = row("canary", release, state="canary", step=1, share=0.05)
    decision = POLICY.decide(observe(found, evidence, seconds))
    assert decision.action == action
    assert re.search(words, decision.reason), decision.reason


@pytest.mark.parametrize(
    ("evidence", "action"), [(GOOD, "wait"), (FEW, "wait"), (BAD, "roll_back")]
)
def test_a_paused_release_only_goes_back(evidence: Evidence, action: str) -> None:
    found = row("canary", state="canary", step=1, is_paused=True)
    assert POLICY.decide(observe(found, evidence, 9999)).action == action


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": [0.5, 0.25]}, "that grow"),
        ({"steps": [0.5, 1.0]}, "between 0 and 1"),
        ({"steps": []}, "at least 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"margins": {"beauty": 0.1}}, "Extra inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReleaseOptions.model_validate(values)
