"""Stands for an adapter whose base's replicas answer for it: a process without a model.

It begins by having its base load the adapter, so the release controller finds out here whether the
adapter works before it gets traffic; the gateways then ask the base. No `__call__`, as everywhere.

    application = deploy_with(AdapterOnBase, "adapter", "sha256:…", DeploymentOptions())
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any, cast

from cluster.database import open_database
from cluster.errors import NotFoundError, PackageError, UpstreamFailedError, UpstreamTimeoutError
from cluster.model_package import ModelPackage
from cluster.releases import Deployment, ReleaseStore
from cluster.settings import load_settings
from serve_apps.description import Description
from serve_apps.handles import Handles
from serve_apps.replicas import open_package_of

logger = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 120.0
_BASE_TIMEOUT_S = 600.0
"""A base may still be on its way up when all of a cluster begins anew."""
_RETRY_S = 2.0


class AdapterOnBase:
    """The only replica of such an adapter."""

    async def __init__(self, digest: str, _options: dict[str, Any]) -> None:  # type: ignore[misc]
        package = await asyncio.to_thread(open_package_of, digest)
        store = ReleaseStore(open_database(load_settings().database))
        rows = await asyncio.to_thread(lambda: store.snapshot().serving)
        base = base_application(package, rows)
        device = await _load_on(base, digest)
        logger.info("adapter %s is answered by %s", digest, base)
        self._description = Description(digest, device)

    async def describe(self) -> Description:
        """Which adapter this is, and on what its base computes."""
        return self._description


def base_application(adapter: ModelPackage, serving: Iterable[Deployment]) -> str:
    """The application that serves an adapter's base.

    Raises:
        PackageError: it is no adapter.
        NotFoundError: its base is not served.
    """
    info = adapter.manifest.adapter
    if info is None:
        raise PackageError(
            f"package {adapter.digest} is no adapter and has no base to share",
            hint="deploy it without shares_base",
        )
    for row in serving:
        if row.digest == info.base_digest:
            return row.application
    raise NotFoundError(
        f"the base of adapter {adapter.digest} is not served: no deployed version has digest "
        f"{info.base_digest}",
        hint="deploy the base first, or the adapter without shares_base",
    )


async def _load_on(application: str, digest: str) -> str:
    """The device that the base computes on, once one of its replicas holds the adapter."""
    handles = Handles()
    until_s = time.monotonic() + _BASE_TIMEOUT_S
    while True:
        try:
            found = await handles.call(
                application, "load_adapter", digest, timeout_s=_LOAD_TIMEOUT_S
            )
            return cast(Description, found).device
        except (UpstreamFailedError, UpstreamTimeoutError) as error:
            if time.monotonic() > until_s:
                raise
            logger.info("%s does not take adapter %s yet: %s", application, digest, error)
        # Anew each time: an application of this name may have been deleted in between.
        handles.forget(application)
        await asyncio.sleep(_RETRY_S)
