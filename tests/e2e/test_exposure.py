"""What a running system shows to others: nothing beyond its owner and, unless asked for, beyond loopback.

The system has everything that opens files and sockets: two gateways, relays, TLS, metrics, an admin address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trustme

from tests.e2e.conftest import RunningSystem, free_port, running, wait_until

pytestmark = pytest.mark.slow
CONFIG = """
endpoints:
  chat: {model: simulated, engine: simulated, simulated: {step_ms: 1}}
  other: {model: simulated, engine: simulated, simulated: {step_ms: 1}}
gateway:
  count: 2
  metrics_bind: 127.0.0.1:0
  tls: {certificate: %(directory)s/c.pem, key: %(directory)s/k.pem}
"""
AUTHORITY = trustme.CA()


def write_pair(directory: Path) -> None:
    pair = AUTHORITY.issue_cert("localhost", "127.0.0.1")
    (directory / "c.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (directory / "k.pem").write_bytes(pair.private_key_pem.bytes())
    AUTHORITY.cert_pem.write_to_path(str(directory / "ca.pem"))


def context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    directory = tmp_path_factory.mktemp("run")
    write_pair(directory)
    with running(CONFIG % {"directory": directory}, directory) as system:
        system.url = system.status()["url"]
        yield system


def test_all_addresses_that_people_see_are_https(system: RunningSystem) -> None:
    assert system.url == f"https://127.0.0.1:{system.port}/v1"
    assert system.url in system.log.read_text()
    system.environment["SSL_CERT_FILE"] = str(system.runtime_dir / "ca.pem")
    asked = system.command("chat", "--url", system.url, "--model", "chat", "--max-tokens", "30", "Hello")
    assert asked.returncode == 0, asked.stderr
    assert "simulated" in asked.stdout
    measured = system.command(
        *("bench", "--url", system.url, "--model", "chat", "--concurrency", "2", "--requests", "4"),
        *("--output-tokens", "4", "--json", "-"),
        timeout_s=60,
    )
    assert measured.returncode == 0, measured.stderr
    del system.environment["SSL_CERT_FILE"]
    distrusting = system.command("chat", "--url", system.url, "--model", "chat", "Hello")
    assert distrusting.returncode != 0
    assert "TLS failed" in distrusting.stderr


def test_files_and_sockets_are_for_their_owner_alone(system: RunningSystem) -> None:
    tree = {
        "metadata": "x" * 500_000,
        "prompt": "Hello",
        "max_tokens": 3,
        "model": "other",
    }  # through a relay
    answer = httpx.post(f"{system.url}/completions", json=tree, verify=context(), timeout=20)
    assert answer.status_code == 200, answer.text
    run_dir = Path(system.status()["run_dir"])
    found = {path: path.lstat().st_mode for path in (run_dir, *run_dir.rglob("*"))}
    for path, mode in found.items():
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert stat.S_IMODE(mode) == wanted, f"{path}: {stat.filemode(mode)}"
    names = {path.name for path in found}
    assert {"relay.sock", "internal.sock", "spoe.sock", "gateway.pem", "admin.sock", "config.json"} <= names
    kinds = [stat.S_IFMT(mode) for mode in found.values()]
    assert set(kinds) == {stat.S_IFDIR, stat.S_IFREG, stat.S_IFSOCK}


def test_nothing_listens_beyond_loopback(system: RunningSystem) -> None:
    ports = set()
    for process in [psutil.Process(system.process.pid), *system.descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                address = ipaddress.ip_address(connection.laddr.ip)
                assert address.is_loopback, f"{process.cmdline()}: {connection}"
                if connection.status == psutil.CONN_LISTEN:
                    ports.add(connection.laddr.port)
    assert system.port in ports
    assert len(ports) >= 3, "the public address and two for metrics at least"


def test_no_secret_is_in_a_log_or_in_arguments(system: RunningSystem) -> None:
    secret = (system.runtime_dir / "k.pem").read_text().splitlines()[1]
    for path in Path(system.status()["run_dir"]).rglob("*.log"):
        assert secret not in path.read_text(errors="replace"), path
    for process in system.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert secret not in " ".join(process.cmdline())


def test_a_broken_certificate_is_in_the_status_until_it_is_mended(system: RunningSystem) -> None:
    good = (system.runtime_dir / "k.pem").read_bytes()
    (system.runtime_dir / "k.pem").write_bytes(AUTHORITY.issue_cert("x").private_key_pem.bytes())
    wait_until(lambda: "is not the key of" in json.dumps(system.status().get("warnings")), 15, "it is said")
    assert "is not the key of" in system.command("status").stdout.replace("\n", " ")
    assert httpx.get(f"{system.url}/models", verify=context(), timeout=20).status_code == 200
    (system.runtime_dir / "k.pem").write_bytes(good)
    wait_until(lambda: system.status().get("warnings") == [], 15, "it is mended")


def test_a_certificate_that_cannot_be_used_stops_the_start_with_its_reason(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "c.pem").unlink()
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % {"directory": tmp_path})
    system = RunningSystem(tmp_path, str(config), "--set", f"gateway.metrics_bind=127.0.0.1:{free_port()}")
    try:
        assert system.process.wait(20) != 0
        assert "gateway.tls.certificate" in system.log.read_text()
        assert os.listdir(tmp_path).count("headrace") == 0, "nothing was begun"
    finally:
        system.close()
