"""headrace as one Ray Serve application: `import_path: headrace.ray_serve:app` (docs/guides/ray-serve.md).

Puts the deployment and the system that it holds together. Must not know Ray.
"""

from __future__ import annotations

from typing import Any

from headrace.control.hosted_system import READY_LIMIT_S, HostedSystem
from headrace.errors import ConfigError
from headrace.fabric.ray_serve import application

_KNOWN: dict[str, tuple[type, ...]] = {"name": (str,), "ready_limit_s": (int, float)}


def app(args: dict[str, Any]) -> Any:
    """Return an Application of Ray Serve. args: name of the system ("default" if it is not given), and
    ready_limit_s, how long a start may take (1800). The config is the deployment's `user_config`.

    Raises ConfigError.
    """
    wrong = [key for key, value in args.items() if key not in _KNOWN or not isinstance(value, _KNOWN[key])]
    if wrong:
        given = ", ".join(f"{key}={args[key]!r}" for key in wrong)
        raise ConfigError(
            f"args: got {given}; known are name, a text, and ready_limit_s, a number of seconds. "
            "headrace's config belongs into the deployment's user_config"
        )
    name, limit_s = args.get("name", "default"), float(args.get("ready_limit_s", READY_LIMIT_S))
    return application(HostedSystem, name=name, ready_limit_s=limit_s)
