"""Ray Serve's side of routing by prefix: it runs wherever a language model is called from.

Decisions are prefix_routing.py's. Also tells placements.py which replica took which stream, and
which replicas take requests at all.

    serve.deployment(…, request_router_config=prefix_routing())
"""

from __future__ import annotations

import logging
from typing import Any

from ray import cloudpickle
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_apps.llm import placements
from serve_apps.llm.channels import Channel
from serve_apps.llm.engine import EngineRequest
from serve_apps.llm.prefix_routing import PrefixIndex, PrefixRoutingPolicy, block_hashes

logger = logging.getLogger(__name__)


def prefix_routing() -> RequestRouterConfig:
    """How requests for a language model find a replica.

    Serve refuses to be told the class of an application's outermost deployment, because HAProxy
    would not ask it; ours is called through handles alone, which do. It also keeps a router for as
    long as the process lives, so nothing of one deployment's options may be told to it.
    """
    return RequestRouterConfig.from_serialized_request_router_cls(
        {}, cloudpickle.dumps(PrefixRouter)
    )


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends a prompt where its beginning is in the cache."""

    def initialize_state(self) -> None:
        """Called by Serve before anything else."""
        self._index = PrefixIndex()
        self._policy = PrefixRoutingPolicy()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with all that take requests, whenever they change."""
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        self._index.keep_only(names)
        placements.PLACEMENTS.replicas_are(self.app_name, names)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which to try them, each in a rank of its own."""
        if pending_request is not None:
            # All are tried at once, so before the next time Serve is to wait.
            pending_request.routing_context.should_backoff = True
        request = _argument(pending_request)
        if isinstance(request, Channel):
            return [[r for r in candidate_replicas if r.replica_id.unique_id == request.replica]]
        if not isinstance(request, EngineRequest):
            return [candidate_replicas]
        given = (*request.prompt_ids, *request.answer_ids)
        blocks = block_hashes(given, request.adapter, request.tenant)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        decision = self._policy.decide(
            [
                self._index.candidate(
                    name,
                    blocks,
                    self.replica_queue_len_cache.get(replica.replica_id) or 0,
                    is_suspect=placements.PLACEMENTS.is_suspect(self.app_name, name),
                )
                for name, replica in by_name.items()
            ]
        )
        logger.debug("request %s: %s", request.request_id, decision.reason)
        # Before it arrives there: the next request may have the same beginning.
        self._index.note(decision.order[0], blocks)
        return [[by_name[name]] for name in decision.order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, _result: Any
    ) -> None:
        """Called by Serve once a replica took the request."""
        request = _argument(pending_request)
        if isinstance(request, EngineRequest | Channel):
            placements.PLACEMENTS.placed(request.request_id, self.app_name, replica_id.unique_id)


def _argument(pending: PendingRequest | None) -> object:
    """What is to be generated or listened to, or the argument of some other call."""
    return pending.args[0] if pending is not None and pending.args else None
