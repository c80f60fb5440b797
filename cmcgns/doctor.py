"""Check a machine or a cluster before a run: `python -m cmcgns.doctor [--section.key=value ...]`; see --help."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pydantic import Field, PositiveInt

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED, run_job
from cmcgns.cluster import machine_checks
from cmcgns.cluster.check_results import CheckResult, Requirements, any_failed, print_result, print_summary
from cmcgns.cluster.machine_checks import StorageAccess
from cmcgns.config import RunSections, Section
from cmcgns.errors import UserError, first_line
from cmcgns.terminal import console


class DoctorConfig(Section):
    nodes: PositiveInt | None = None
    """Number of nodes that the cluster should have: a node that could not join is found only by counting."""
    megabytes: PositiveInt = 64
    """MiB that each node writes to and reads from run.storage, and that pairs of nodes and the GPUs of a node all-reduce."""
    timeout_s: float = Field(60.0, gt=0.0)
    """Timeout of each node, pair or bucket."""
    pairs: PositiveInt = 512
    """Most pairs of nodes to measure, in rounds in which each node has one partner."""


class DoctorJobConfig(RunSections):
    """Settings of a pretraining run, so that its file and keys are accepted, and those of the doctor."""

    doctor: DoctorConfig = DoctorConfig()


PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
"""Default ports of `ray start --head`, and the option that changes each."""


def main(config: DoctorJobConfig) -> int:
    """Print each result as it arrives. Returns exit status 1 if a check failed, else 0."""
    terminal, lines = console(), list[CheckResult]()
    check = check_cluster if os.environ.get("RAY_ADDRESS") else check_this_machine
    for line in check(config):
        print_result(terminal, line)
        lines.append(line)
    print_summary(terminal, lines)
    return STATUS_FAILED if any_failed(lines) else 0


def requirements_of(config: DoctorJobConfig) -> Requirements:
    """What the run will need on a machine."""
    train, doctor = config.train, config.doctor
    on_gpu = config.clustering.device == "gpu"
    return Requirements(train.use_gpu, train.engine == "deepspeed", on_gpu, doctor.megabytes, doctor.timeout_s)


def check_this_machine(config: DoctorJobConfig) -> Iterator[CheckResult]:
    """Results of this machine, without Ray."""
    name = socket.gethostname()
    yield CheckResult(
        "ok", "cluster", name, "RAY_ADDRESS is not set: only this machine is checked, as a run would use it"
    )
    found = machine_checks.versions()
    yield CheckResult("ok", "versions", name, ", ".join(f"{package} {version}" for package, version in found.items()))
    yield from machine_checks.check_machine(name, requirements_of(config))
    yield from port_checks(name)
    if _is_stored(config.data.uri):
        yield from _check_uri(
            name, "data.uri", storage.absolute("data.uri", config.data.uri), machine_checks.check_data
        )
    with _marker_file(config.run.storage) as (root, mark):
        yield from _check_uri(
            name, "run.storage", root, lambda uri: machine_checks.check_storage(uri, mark, config.doctor.megabytes)
        )


def _check_uri(name: str, key: str, uri: str, check: Callable[[str], StorageAccess]) -> Iterator[CheckResult]:
    access = check(uri)
    if access.error:
        yield CheckResult("failed", key, name, f"{uri}: {access.error}")
    else:
        speed = f", written at {access.write_mib_s:.0f}, read at {access.read_mib_s:.0f} MiB/s"
        yield CheckResult("ok", key, name, f"{uri} is there{speed if access.read_mib_s else ''}")


def port_checks(name: str) -> Iterator[CheckResult]:
    """Whether the ports of a head node are free."""
    taken = [port for port in PORTS if not _is_free(port)]
    for port in taken:
        yield CheckResult(
            "warning", "ports", name, f"port {port} is already in use, by a Ray head or another program",
            f"For `ray start --head` on this machine set {PORTS[port]} to another port",
        )  # fmt: skip
    if not taken:
        yield CheckResult("ok", "ports", name, f"{', '.join(map(str, PORTS))} are free for `ray start --head`")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def check_cluster(config: DoctorJobConfig) -> Iterator[CheckResult]:
    """Results of every node of the cluster in RAY_ADDRESS, and of the connections between them."""
    from cmcgns.cluster import cluster_checks
    from cmcgns.cluster.session import ray_session

    doctor = config.doctor
    try:
        with ray_session(needed=[]):
            nodes = cluster_checks.start_inspectors()
            yield from cluster_checks.node_checks(nodes, doctor.nodes)
            yield from cluster_checks.version_checks(nodes, doctor.timeout_s)
            yield from cluster_checks.clock_checks(nodes, doctor.timeout_s)
            yield cluster_checks.token_check(cluster_checks.dashboard_url())
            yield from cluster_checks.local_checks(nodes, requirements_of(config), doctor.timeout_s)
            if _is_stored(config.data.uri):
                uri = storage.absolute("data.uri", config.data.uri)
                yield from cluster_checks.data_checks(nodes, uri, doctor.timeout_s)
            with _marker_file(config.run.storage) as (root, mark):
                yield from cluster_checks.storage_checks(nodes, root, mark, doctor.megabytes, doctor.timeout_s)
            yield from cluster_checks.pair_checks(
                nodes, config.train.use_gpu, doctor.megabytes, doctor.pairs, doctor.timeout_s
            )
    except UserError as error:
        yield CheckResult("failed", "cluster", os.environ["RAY_ADDRESS"], first_line(error))


def _is_stored(uri: str) -> bool:
    return uri.partition(":")[0] != "phantom"


@contextmanager
def _marker_file(uri: str) -> Iterator[tuple[str, str]]:
    """The absolute run.storage, and the name of an empty file that exists in it within the context."""
    root, mark = storage.absolute("run.storage", uri), f"{machine_checks.PROBE}{os.urandom(6).hex()}"
    fresh = not storage.is_s3(root) and not Path(root).exists()
    # if it cannot be written, the result of each node says so
    with suppress(UserError, OSError):
        storage.write_bytes(storage.join(root, mark), b"")
    try:
        yield root, mark
    finally:
        with suppress(UserError, OSError):
            storage.delete_file(storage.join(root, mark))
            if fresh:
                Path(root).rmdir()


if __name__ == "__main__":
    sys.exit(run_job(main, DoctorJobConfig, None))
