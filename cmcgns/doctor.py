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
from cmcgns.cluster import machine_checks as host
from cmcgns.cluster import machine_checks as objects
from cmcgns.cluster.machine_checks import CheckResult, any_failed, print_result, print_summary
from cmcgns.config import RunSections, Section
from cmcgns.errors import UserError, first_line
from cmcgns.terminal import console


class DoctorConfig(Section):
    nodes: PositiveInt | None = None
    """Nodes that the cluster should have; a node that could not join can only be missed by number."""
    megabytes: PositiveInt = 64
    """MiB that each node writes to and reads from run.storage, and that each pair of nodes reduces."""
    timeout_s: float = Field(60.0, gt=0.0)
    """Seconds after which a node, a pair or a bucket that does not answer has failed."""
    pairs: PositiveInt = 512
    """Most pairs of nodes that are measured, in rounds in which each node has one partner."""


class DoctorJobConfig(RunSections):
    """All settings: a pretraining run's, so that its own file and keys can be given, and the doctor's."""

    doctor: DoctorConfig = DoctorConfig()


PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
"""Where `ray start --head` listens by default, and the option that moves it."""


def diagnose(config: DoctorJobConfig) -> int:
    """Exit status of a visit: 0 where nothing has failed, else 1. Every line is printed as it is found."""
    terminal, lines = console(), list[CheckResult]()
    look = check_cluster if os.environ.get("RAY_ADDRESS") else check_this_machine
    for line in look(config):
        print_result(terminal, line)
        lines.append(line)
    print_summary(terminal, lines)
    return STATUS_FAILED if any_failed(lines) else 0


def requirements_of(config: DoctorJobConfig) -> host.Requirements:
    """What the run will want of a machine."""
    return host.Requirements(
        config.train.use_gpu, config.train.engine == "deepspeed", config.clustering.device == "gpu"
    )


def check_this_machine(config: DoctorJobConfig) -> Iterator[CheckResult]:
    """Lines of this machine, on which no cluster is looked for."""
    name = socket.gethostname()
    yield CheckResult(
        "ok", "cluster", name, "RAY_ADDRESS is not set: this machine alone is looked at, as a run would use it"
    )
    found = host.versions()
    yield CheckResult("ok", "versions", name, ", ".join(f"{package} {version}" for package, version in found.items()))
    yield from host.check_machine(name, requirements_of(config))
    yield from port_checks(name)
    if _is_stored(config.data.uri):
        yield from _check_uri(name, "data.uri", storage.absolute("data.uri", config.data.uri), objects.check_data)
    with _marker_file(config.run.storage) as (root, mark):
        yield from _check_uri(
            name, "run.storage", root, lambda uri: objects.check_storage(uri, mark, config.doctor.megabytes)
        )


def _check_uri(name: str, key: str, uri: str, look: Callable[[str], objects.StorageAccess]) -> Iterator[CheckResult]:
    reached = look(uri)
    if reached.error:
        yield CheckResult("failed", key, name, f"{uri}: {reached.error}")
    else:
        speed = f", written at {reached.write_mib_s:.0f}, read at {reached.read_mib_s:.0f} MiB/s"
        yield CheckResult("ok", key, name, f"{uri} is there{speed if reached.read_mib_s else ''}")


def port_checks(name: str) -> Iterator[CheckResult]:
    """Ports of a head node that something else listens on."""
    taken = [port for port in PORTS if not _is_free(port)]
    for port in taken:
        yield CheckResult(
            "warning", "ports", name, f"something listens on {port} already, a Ray head or another program",
            f"`ray start --head` on this machine needs {PORTS[port]}=ANOTHER",
        )  # fmt: skip
    if not taken:
        yield CheckResult("ok", "ports", name, f"{', '.join(map(str, PORTS))} are free for `ray start --head`")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just been closed is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def check_cluster(config: DoctorJobConfig) -> Iterator[CheckResult]:
    """Lines of every node of the cluster that RAY_ADDRESS names, and of the ways between them."""
    from cmcgns.cluster import cluster_checks
    from cmcgns.cluster.session import ray_session

    doctor = config.doctor
    try:
        with ray_session(needed=[]):
            nodes = cluster_checks.inspected_nodes()
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
def _marker_file(place: str) -> Iterator[tuple[str, str]]:
    """The absolute run.storage and the name of a file of ours that lies in it meanwhile."""
    root, mark = storage.absolute("run.storage", place), f"{objects.PROBE}{os.urandom(6).hex()}"
    fresh = not storage.is_s3(root) and not Path(root).exists()
    # what cannot be written is each node's own line
    with suppress(UserError, OSError):
        storage.write_bytes(storage.join(root, mark), b"")
    try:
        yield root, mark
    finally:
        with suppress(UserError, OSError):
            storage.delete_file(storage.join(root, mark))
            if fresh:
                Path(root).rmdir()


def main(config: DoctorJobConfig) -> int:
    """Exit status of a visit."""
    pass

    return diagnose(config)


if __name__ == "__main__":
    sys.exit(run_job(main, DoctorJobConfig, None))
