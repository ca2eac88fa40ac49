"""A cluster with token and TLS, made by the commands that docs/security.md gives; who gets in and who does not."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray.util

from gcml_ray.config.file import save_config
from gcml_ray.files.run_folder import RunFolder
from tests.fakes import fake_config

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_TIMEOUT_S = 180.0
JOIN_TIMEOUT_S = 120.0
CLIENT = """
import sys, ray
print("trying", flush=True)
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("joined")
"""
FEDERATION = """
import sys, threading
from actors.run import run_federation
from actors.listener import NullListener
from gcml_ray.config.file import load_config
from tests.fakes import FakeTrainers

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    print(run_federation(
        config, listener=NullListener(), stop=threading.Event(), make_trainer=FakeTrainers(num_values=100_000)
    ).status)
"""


@dataclass(frozen=True)
class Head:
    """A running head node, and what one must have to join it."""

    address: str
    environment: dict[str, str]


def documented_commands() -> str:
    """The shell commands of the page that make certificates."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def run(
    command: list[str], environment: dict[str, str], *, folder: Path | None = None, timeout_s: float = JOIN_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """A command of ours in an environment of its own."""
    return subprocess.run(  # noqa: S603
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def free_ports(count: int) -> list[int]:
    """From the operating system, which gives none of those that Ray takes for its workers."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One head node with token and TLS. Ended by its own process: ``ray stop`` would end those of others too."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    node = ray.util.get_node_ip_address()
    run(["bash", "-ec", documented_commands()], dict(os.environ) | {"NODE": node}, folder=folder).check_returncode()
    environment = dict(os.environ) | {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "5" * 64,
        "PYTHONPATH": str(PAGE.parents[1]),
    }
    port, client_port = free_ports(2)
    private = Path(os.environ["RAY_TMPDIR"]) / "tls"
    arguments = f"start --head --block --port={port} --node-ip-address={node} --temp-dir={private}"
    arguments += f" --ray-client-server-port={client_port} --include-dashboard=false"
    arguments += " --num-cpus=2 --object-store-memory=100000000"
    output = folder / "start.txt"
    with output.open("w") as file:
        command = [*RAY, *arguments.split()]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)  # noqa: S603 - ours
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
        yield Head(f"{node}:{port}", environment)
    finally:
        process.terminate()
        process.wait(timeout=120)


def join(head: Head, *, timeout_s: float = JOIN_TIMEOUT_S, **changes: str | None) -> str:
    """What a client says that tries to join; empty where it was still trying when its time was over."""
    environment = {key: value for key, value in (head.environment | changes).items() if value is not None}
    try:
        ended = run([sys.executable, "-c", CLIENT, head.address], environment, timeout_s=timeout_s)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode()
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def joining(head: Head) -> tuple[str, float]:
    """What a client says that has all it needs, and how many seconds it takes."""
    began = time.monotonic()
    return join(head), time.monotonic() - began


def test_client_with_certificate_and_token_gets_in(joining: tuple[str, float]) -> None:
    assert joining[0].endswith("joined\n")


def test_client_without_tls_does_not_get_in(head: Head, joining: tuple[str, float]) -> None:
    """It would try for more than a minute; here it has several times as long as one that gets in."""
    said = join(head, timeout_s=min(JOIN_TIMEOUT_S, 5 + 3 * joining[1]), RAY_USE_TLS=None)
    assert said.startswith("trying")
    assert "joined" not in said


def test_client_with_another_token_is_refused(head: Head) -> None:
    said = join(head, RAY_AUTH_TOKEN="6" * 64)
    assert "joined" not in said
    assert "Failed to connect to Ray cluster" in said


def test_client_without_a_token_is_refused(head: Head, tmp_path: Path) -> None:
    said = join(head, RAY_AUTH_TOKEN=None, HOME=str(tmp_path))
    assert "joined" not in said
    assert "no authentication token was found" in said


def test_federation_with_signed_and_encoded_pushes_runs_over_tls(head: Head, tmp_path: Path) -> None:
    """First pushes are whole, 400,000 bytes; later ones a tenth of the values: 8 + 12,500 (bitmap) + 20,000 bytes."""
    config = fake_config(
        tmp_path,
        sites=("A", "B"),
        federation={"rounds": 3},
        resources={"pool": "ray", "address": head.address, "cpus_per_site": 0.5},
        wire={"sign": True, "encoding": "topk", "topk_share": 0.1},
    )
    save_config(config, tmp_path / "config.yaml")
    ended = run([sys.executable, "-c", FEDERATION, str(tmp_path / "config.yaml")], head.environment)
    assert (ended.returncode, ended.stdout) == (0, "finished\n"), ended.stderr
    pushes = [push for record in RunFolder.open(tmp_path / "run").rounds() for push in record.pushes]
    assert [push.reason for push in pushes] == [""] * 6
    assert sorted(push.size_bytes for push in pushes) == [32_508] * 4 + [400_000] * 2


def test_documented_commands_leave_no_readable_token_and_keys(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    commands = f'umask 077; "{sys.executable}" -m ray.scripts.scripts get-auth-token --generate'
    run(["bash", "-ec", commands], environment | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}).check_returncode()
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
