"""What Serve asks of its router, with replicas that are none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from serve_apps.llm import placements
from serve_apps.llm.channels import Channel
from serve_apps.llm.deployment import build_language_model
from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.placements import Placements
from serve_apps.llm.request_router import PrefixRouter, prefix_routing
from serve_apps.options import DeploymentOptions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEPLOYMENT = DeploymentID(name="language_model", app_name="talker.v1")


class Replica:
    max_ongoing_requests = 64

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Placements:
    """Those of this process, as the gateway's backend sees them."""
    found = Placements()
    monkeypatch.setattr(placements, "PLACEMENTS", found)
    return found


def ask(request_id: str, token: int) -> PendingRequest:
    request = EngineRequest(request_id, (token,) * 600, Sampling(max_tokens=4))
    return pending("generate", request)


def pending(method: str, *arguments: Any) -> PendingRequest:
    metadata = RequestMetadata(
        request_id="q", internal_request_id="q", call_method=method, is_streaming=True
    )
    return PendingRequest(args=list(arguments), kwargs={}, metadata=metadata)


def make_router() -> PrefixRouter:
    config = prefix_routing()
    # As it arrives in another process.
    router: PrefixRouter = config.get_request_router_class()(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        prefer_local_node_routing=False,
    )
    router.initialize_state(**config.request_router_kwargs)
    return router


async def order(router: PrefixRouter, asked: PendingRequest) -> list[str]:
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), asked)
    return ["+".join(replica.replica_id.unique_id for replica in rank) for rank in ranks]


async def test_a_prefix_stays_with_its_replica_and_survives_others_coming_and_going(
    found: Placements,
) -> None:
    router, replicas = make_router(), {name: Replica(name) for name in "abc"}
    router.update_replicas([replicas["a"], replicas["b"]])
    await asyncio.sleep(0.01)
    first, second = await order(router, ask("1", 5))
    router.on_send_request(replicas[first].replica_id)
    assert await order(router, ask("2", 5)) == [first, second]
    router.update_replicas(list(replicas.values()))
    assert (await order(router, ask("3", 5)))[0] == first
    router.update_replicas([replicas[second], replicas["c"]])
    assert first not in await order(router, ask("4", 5))
    router.update_replicas([replicas["c"]])
    assert await order(router, ask("5", 5)) == ["c"]


async def test_a_channel_goes_to_the_replica_that_it_names_or_to_none(found: Placements) -> None:
    router, replicas = make_router(), {name: Replica(name) for name in "abc"}
    router.update_replicas(list(replicas.values()))
    assert await order(router, pending("listen", Channel("1", "me", "b"))) == ["b"]
    assert await order(router, pending("listen", Channel("2", "me", "gone"))) == [""]
    with found.follow("1", drain_s=0) as placement:
        asked = pending("listen", Channel("1", "me", "b"))
        router.on_request_routed(asked, replicas["b"].replica_id, None)
        assert placement.replica == "b"


async def test_a_busy_replica_is_passed_over(found: Placements) -> None:
    router, replicas = make_router(), {name: Replica(name) for name in "ab"}
    router.update_replicas(list(replicas.values()))
    await asyncio.sleep(0.01)
    first, second = await order(router, ask("1", 5))
    for _ in range(9):
        router.on_send_request(replicas[first].replica_id)
    assert await order(router, ask("2", 5)) == [second, first]


async def test_a_replica_that_failed_is_asked_last(found: Placements) -> None:
    router = make_router()
    router.update_replicas([Replica("a"), Replica("b")])
    first, second = await order(router, ask("1", 5))
    with found.follow("1", drain_s=0) as placement:
        router.on_request_routed(ask("1", 5), ReplicaID(first, DEPLOYMENT), None)
        found.failed(placement)
    assert await order(router, ask("2", 5)) == [second, first]


async def test_a_stream_learns_that_its_replica_has_to_go(found: Placements) -> None:
    router = make_router()
    replicas = [Replica("a"), Replica("b")]
    router.update_replicas(replicas)
    # Each in its own time: one router outlives the deployments, and their options.
    with found.follow("1", drain_s=0) as now, found.follow("2", drain_s=60) as later:
        for number in ("1", "2"):
            router.on_request_routed(ask(number, 5), replicas[0].replica_id, None)
        router.update_replicas(replicas)
        assert not now.is_due
        router.update_replicas(replicas[1:])
        assert (now.is_due, later.is_due) == (True, False)


def test_serve_hands_the_router_on_to_whoever_calls() -> None:
    """Through its own format, and past its refusal of routers that HAProxy would not ask."""
    application = build_language_model("sha256:1", DeploymentOptions(drain_s=7))
    config = application._bound_deployment._deployment_config
    arrived = type(config).from_proto_bytes(config.to_proto_bytes()).request_router_config
    assert arrived.get_request_router_class() is PrefixRouter
    # It outlives the deployment, and must know nothing of its options.
    assert arrived.request_router_kwargs == {}
    assert arrived.is_default_request_router()


async def test_other_calls_go_to_any_replica(found: Placements) -> None:
    router = make_router()
    router.update_replicas([Replica("a"), Replica("b")])
    assert await order(router, pending("describe")) == ["a+b"]
    router.on_request_routed(pending("describe"), ReplicaID("a", DEPLOYMENT), None)
