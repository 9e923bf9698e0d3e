"""When a system's placement groups are asked for and had: told by a process of its own, which asks Ray.

`python -m benchmarks.ray_groups ADDRESS NAMESPACE` prints a line of JSON for each change that it sees, with
the moment on this machine's monotonic clock, until its stdin closes. Must not know what is placed.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from types import TracebackType

from tests.cluster.ray_rig import RayCluster

PERIOD_S = 0.01
NAMESPACE = "headrace-default"
_START_LIMIT_S = 60.0


class GroupWatch:
    """The changes of placement groups from the block's begin on."""

    def __init__(self, cluster: RayCluster) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ray_groups", cluster.address, NAMESPACE],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._seen: dict[tuple[str, str], float] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._is_up = threading.Event()

    def __enter__(self) -> GroupWatch:
        self._thread.start()
        if not self._is_up.wait(_START_LIMIT_S):
            self.close()
            raise RuntimeError("the process that watches Ray's placement groups did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def moment_s(self, group: str, state: str, after_s: float) -> float | None:
        """Return when a placement group of this group of processes was first seen so after a moment; None:
        it was not."""
        seen = [
            at_s
            for (name, seen_state), at_s in list(self._seen.items())
            if f"/{group}#" in name and seen_state == state and at_s >= after_s
        ]
        return min(seen, default=None)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            change = json.loads(line)
            self._seen.setdefault((change["name"], change["state"]), change["at_s"])
            self._is_up.set()


def main() -> int:
    import ray
    from ray.util import placement_group_table

    ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
    known: dict[str, str] = {}
    print(json.dumps({"name": "", "state": "", "at_s": time.monotonic()}), flush=True)
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        for group, entry in placement_group_table().items():
            if known.get(group) != entry["state"]:
                for state in ("asked", entry["state"])[group in known :]:
                    change = {"name": entry["name"], "state": state, "at_s": time.monotonic()}
                    print(json.dumps(change), flush=True)
                known[group] = entry["state"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
