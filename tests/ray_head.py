"""A Ray cluster of one machine for tests: own ports, own folder, own token, and gone at the end."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cmcgns.storage.errors import RETRY_LIMIT_VARIABLE
from tests.ranks import free_port

START_S = 90
MIB = 2**20
KEEP_PROCESSES = {"idle_worker_killing_time_threshold_ms": 10_000, "num_workers_soft_limit": 8}
"""A task that comes soon after another finds a process that has its imports: torch and transformers take 5 s."""


@dataclass(frozen=True)
class RayHead:
    """A running cluster; ``environment`` is what its drivers and ``ray job submit`` need."""

    folder: Path
    dashboard: str
    """Address of the dashboard, which is also where jobs are submitted."""
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster: ``ray start``, what it started, and what that started."""
        return _family(self.process.pid)

    def titles(self) -> set[str]:
        """Titles of its processes, such as the names of Ray actors."""
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                found.add(" ".join(process.cmdline()))
        return found


def node_ip() -> str:
    """The address under which Ray knows this machine: it takes no loopback for an answer."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


@contextmanager
def running_head(cpus: int = 2, object_store_mib: int = 400) -> Iterator[RayHead]:
    """``ray start --head`` in a folder of its own; only the processes it made are ended."""
    # short: Ray puts sockets into it, whose paths may have 107 letters
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, dashboard_port = free_port(), free_port()
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_ADDRESS": f"{node_ip()}:{port}",
        # jobs of the cluster say `python`: let it be the one that runs the tests
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "REPORTER_UPDATE_INTERVAL_MS": "60000",  # nobody looks at the statistics of processes
    }
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats",
                f"--num-cpus={cpus}", f"--object-store-memory={object_store_mib * MIB}",
                f"--port={port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}/r",
                f"--system-config={json.dumps(KEEP_PROCESSES)}", "--include-log-monitor=False",
            ],
            env={**os.environ, **own} | {"RAY_ADDRESS": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    head = RayHead(folder, f"http://127.0.0.1:{dashboard_port}", process, own)
    try:
        _wait_until_up(head)
        yield head
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connected(head: RayHead) -> Iterator[None]:
    """This process as a driver of ``head``; inside another such block it reconnects, with the variables of now.

    RAY_ADDRESS stays unset: a job in this process takes the machine for its own, and one in a process of its own starts a Ray.
    """
    import ray

    before = ray.is_initialized()
    _connect(head)
    try:
        yield
    finally:
        ray.shutdown()
    if before:
        _connect(head)


def _connect(head: RayHead) -> None:
    import ray

    ray.shutdown()
    variables = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", RETRY_LIMIT_VARIABLE))}
    ray.init(
        head.environment["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables}
    )


def _wait_until_up(head: RayHead) -> None:
    request = urllib.request.Request(
        f"{head.dashboard}/api/version", headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    )
    end = time.monotonic() + START_S
    while time.monotonic() < end and head.process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            json.load(answer)
            return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not start: {(head.folder / 'start.log').read_text()[-2000:]}")


def stop(head: RayHead) -> None:
    """End the cluster's processes, those alone: first asked, then killed."""
    _end(head.process)


def _end(process: subprocess.Popen[bytes]) -> None:
    owned = _family(process.pid)
    for each in owned:
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    _, left = psutil.wait_procs(owned, timeout=3)  # the autoscaler's process never ends when asked
    for each in left:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, timeout=5)
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it started; none where it is gone."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def joined_node(
    head: RayHead,
    cpus: int = 2,
    object_store_mib: int = 200,
    labels: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Another node of the cluster on this machine: ``ray start --address``; signs off at the end, or a later test counts on it
    until the head has missed it for half a minute."""
    folder, before = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), state(head).nodes
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", f"--address={head.environment['RAY_ADDRESS']}", "--block",
                "--disable-usage-stats", f"--num-cpus={cpus}", f"--object-store-memory={object_store_mib * MIB}",
                f"--dashboard-agent-listen-port={free_port()}", *([f"--labels={labels}"] if labels else []),
                # as on a machine of its own: in a folder for both, one node's end would take the other's copy of a job's files
                f"--temp-dir={folder}/r",
            ],
            env={**os.environ, **head.environment, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_joined(head, before, process, folder)
        yield process
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_joined(head: RayHead, before: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if state(head).nodes > before:
            return
    raise RuntimeError(f"the node did not join: {(folder / 'start.log').read_text()[-2000:]}")


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a node: ``ray start``, its raylet, and every process that runs on it."""
    doomed = _family(process.pid)[::-1]
    for each in doomed:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(doomed, timeout=10)
    process.wait()


STATE = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False, logging_level="ERROR")
groups = [group["state"] for group in ray.util.placement_group_table().values()]
alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
actors = [(actor.class_name, actor.node_id) for actor in alive]
nodes = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({"all": ray.cluster_resources(), "free": ray.available_resources(), "groups": groups, "actors": actors,
                  "nodes": nodes}))
"""


@dataclass(frozen=True)
class ClusterState:
    """What a cluster holds."""

    all: dict[str, float]
    free: dict[str, float]
    groups: list[str]
    """State of each placement group that there ever was."""
    actors: list[tuple[str, str]]
    """Class and node of each living actor."""
    nodes: int


def state(head: RayHead) -> ClusterState:
    """The cluster's state, asked by a driver of its own."""
    asked = subprocess.run(
        [sys.executable, "-c", STATE],
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ClusterState(**json.loads(asked.stdout.splitlines()[-1]))


def nodes_of_trials(head: RayHead) -> set[str]:
    """The nodes on which actors of trials live."""
    return {node for name, node in state(head).actors if name in ("TrialRunner", "BankActor", "RayTrainWorker")}
