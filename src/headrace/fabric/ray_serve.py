"""A Ray Serve deployment around something that is hosted: Ray Serve's words, and nothing of what they mean.

Owns which of Ray Serve's calls becomes which of ours, and how Ray Serve tells that an application is deleted.
Must not know: what is hosted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from ray.serve import Application

DEPLOYMENT = "Headrace"
"""The deployment's name: `user_config` stands below it in a Serve config."""
HEALTH_PERIOD_S = 5.0
HEALTH_LIMIT_S = 30.0
LEAVE_LIMIT_S = 180.0
"""For the end of everything after open requests were finished. Ray Serve's own 20 s would cut them."""
_log = logging.getLogger("ray.serve")


class Hosted(Protocol):
    """What the deployment holds. Every call has a limit of its own."""

    async def apply(self, tree: Mapping[str, Any]) -> None:
        """Make it what the config says; return once it serves. Raises HeadraceError and leaves what was."""
        ...

    async def check(self) -> None:
        """Raise HeadraceError unless it serves."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Return its state, for JSON."""
        ...

    async def leave(self, *, is_deleted: bool) -> None:
        """End it, if the application is deleted; else it goes on without this process."""
        ...


class ServeDeployment:
    """What Ray Serve makes in a replica of the deployment. It carries no request of the system's."""

    def __init__(self, make_hosted: Callable[..., Hosted], arguments: Mapping[str, Any]) -> None:
        self._hosted = make_hosted(**arguments)

    def __repr__(self) -> str:
        return f"ServeDeployment({self._hosted})"

    async def reconfigure(self, user_config: Any) -> None:
        """Ray Serve calls it with the first `user_config`, and with each that differs."""
        if not isinstance(user_config, Mapping):
            kind = type(user_config).__name__
            raise HeadraceError(
                f"user_config is a {kind}; it must be headrace's config, a mapping of sections"
            )
        await self._hosted.apply(user_config)

    async def check_health(self) -> None:
        """Ray Serve calls it after each start, and every few seconds."""
        await self._hosted.check()

    async def __call__(self, request: object) -> dict[str, Any]:
        """Answer whoever asks at the application's route: where the gateways are, and how it stands."""
        return await self._hosted.describe()

    async def __del__(self) -> None:
        """Ray Serve calls and awaits it when this replica ends, for whichever reason."""
        await self._hosted.leave(is_deleted=await asyncio.to_thread(_is_deleted))


def application(make_hosted: Callable[..., Hosted], **arguments: Any) -> Application:
    """Return the application whose one deployment holds what `make_hosted(**arguments)` makes there.

    make_hosted: a function or class of a module, which Ray Serve's process imports.
    """
    from ray import serve

    deployment: Any = serve.deployment(
        ServeDeployment,
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_LIMIT_S,
        graceful_shutdown_timeout_s=LEAVE_LIMIT_S,
    )
    bound: Application = deployment.bind(make_hosted, arguments)
    return bound


def _is_deleted() -> bool:
    """Whether the application of this replica is being deleted. A replica alone ends for many reasons."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus

    name = serve.get_replica_context().app_name
    try:
        known = serve.status().applications
    except (RayError, RayServeException) as error:
        _log.warning("headrace goes on: Ray Serve does not say whether %s is deleted: %s", name, error)
        return False
    return name not in known or known[name].status == ApplicationStatus.DELETING
