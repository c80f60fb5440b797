"""Ray session of a job: connect to the cluster in RAY_ADDRESS, or start one on this machine."""

import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from cmcgns import storage
from cmcgns.cluster import cluster_checks, ray_private
from cmcgns.cluster.placement import wait_for_resources
from cmcgns.errors import UserError
from cmcgns.storage.errors import RETRY_LIMIT_S, RETRY_LIMIT_VARIABLE
from cmcgns.terminal import console, print_plan
from cmcgns.user_folders import ray_temp_folder

logger = logging.getLogger(__name__)

LOCAL_CLUSTER = {
    # data tasks come in bursts: keep their processes, with their imports, between epochs
    "idle_worker_killing_time_threshold_ms": 600_000,
    "num_workers_soft_limit": 16,
    # by default blocks that the stream no longer needs stay in the object store for up to a second
    "free_objects_period_milliseconds": 100,
}
"""Settings of a Ray cluster started on this machine for one run."""
ONE_CPU = {"CPU": 1.0}
"""What every job needs, and a run needs in addition to its workers and actors: a CPU for data."""
CONNECT_TIMEOUT_S = 10.0
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of a gRPC client (RFC 9113, 3.4): the preface, and an empty settings frame."""
SETTINGS_FRAME = 4
NO_ANSWER = (
    "no Ray cluster answers at this address. Check with `ray status` on its head that it runs, and that the port is open "
    "from this machine"
)


@contextmanager
def ray_session(
    variables: dict[str, str] | None = None,
    uris: Sequence[str] | None = None,
    needed: Sequence[dict[str, float]] = (ONE_CPU,),
) -> Iterator[float]:
    """CPUs of the Ray cluster in RAY_ADDRESS, or of one started on this machine for the job.

    ``variables`` are environment variables for all its processes; the existing environment has priority. On a cluster with an
    autoscaler, wait until the bundles ``needed`` fit. With ``uris``, check on each node of an existing cluster that versions
    match and that these are reachable.

    Raises:
        UserError: the cluster cannot be joined, is too small, or a check failed on one of its nodes.
    """
    environment = job_environment(variables or {})
    named, ours = os.environ.get("RAY_ADDRESS"), not ray.is_initialized()
    if ours and not named:
        environment |= local_variables()
    with ExitStack() as stack:
        stack.enter_context(_variables(environment))
        if ours:
            ray_private.ignore_uv()
            if not named:
                stack.enter_context(ray_private.loopback_only())
                stack.enter_context(ray_private.own_process_groups())
            _connect(named, environment)
            stack.callback(ray.shutdown)
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it also raises
        if ours and named:
            wait_for_resources(needed, lambda line: print_plan(console(), {"cluster": line}))
        if ours and named and uris is not None:
            check_nodes(uris)
        yield float(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _variables(environment: dict[str, str]) -> Iterator[None]:
    """``environment`` in this process, for the processes that it starts; afterwards as before."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _connect(named: str | None, environment: dict[str, str]) -> None:
    """Join the cluster at ``named``, or start one; its processes get ``environment``."""
    # in a submitted job Ray merges these with the job's own variables; without this it refuses a name that is in both
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    settings: dict[str, Any] = {"runtime_env": {"env_vars": environment}}
    if named:
        _check_address(named)
    else:
        settings = ray_private.local_cluster(LOCAL_CLUSTER)
        protect_token()
        if paths := os.environ.get("PYTHONPATH"):  # Ray's processes start in another folder
            os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep))
    try:
        # Ray puts the current folder on the path of all its processes: a select.py beside the data would be imported
        with chdir("/"), _muted_stderr() if named else nullcontext():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, RayError) as error:
        if not named:
            raise
        raise UserError(f"RAY_ADDRESS {named}: {explain_connection_error(error)}") from None
    except Exception as error:  # what Ray raises has no class of its own
        if "timed out during startup" not in str(error):
            raise
        raise UserError(slow_start(os.getloadavg()[0], os.cpu_count() or 1)) from None


def slow_start(load: float, cpus: int) -> str:
    """What to do where Ray's processes have not started within the 30 s that Ray gives them."""
    return (
        f"Ray did not start on this machine within 30 s (load {load:.0f} on {cpus} CPUs). Start again when the machine is less "
        "busy, or start Ray with `ray start --head` and set RAY_ADDRESS to the address that it prints"
    )


def protect_token() -> None:
    """Make Ray's token file private before Ray reads it, or creates it for everyone to read.

    Raises:
        UserError: the file is a link or belongs to someone else.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        return
    except FileExistsError:
        pass
    except OSError:  # a home that cannot be written: a token for this run alone
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(
            f"Ray's token file {path} is a link or belongs to another user, who could read the token and run code in this "
            "run; delete it"
        )
    if found.st_mode & 0o077:
        path.chmod(0o600)


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Discard what Ray's core prints: one line per second for a wrong token, whatever the log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_address(named: str) -> None:
    """Raise if no gRPC server answers at ``named``: Ray itself would retry for minutes and then abort the process."""
    if named.startswith(("http://", "https://")):
        host = named.rpartition("//")[2].partition(":")[0]
        raise UserError(
            f"RAY_ADDRESS {named}: that is the dashboard, to which `ray job submit --address={named}` sends jobs; a job that "
            f"runs here takes RAY_ADDRESS={host}:6379"
        )
    host, colon, port = named.rpartition(":")
    if not colon or not port.isdigit():
        return  # 'auto', or another kind of address that Ray resolves
    try:
        with socket.create_connection(
            (host.rpartition("//")[2].strip("[]"), int(port)), CONNECT_TIMEOUT_S
        ) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HELLO)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except OSError as error:
        raise UserError(f"RAY_ADDRESS {named}: {NO_ANSWER} ({error})") from None
    if answer[3:4] != bytes([SETTINGS_FRAME]):
        raise UserError(f"RAY_ADDRESS {named}: {NO_ANSWER} (another program uses this port)")


def explain_connection_error(error: BaseException) -> str:
    """Why this process cannot join a cluster, from Ray's error messages, and the fix."""
    messages = []
    inner: BaseException | None = error
    while inner is not None:
        messages.append(str(inner))
        inner = inner.__cause__
    text = " ".join(" ".join(messages).split())
    if "Version mismatch" in text:
        return (
            f"{text[text.index('Version mismatch') :].rstrip('.')}. Run the job with the cluster's own Python and Ray"
        )
    if "InvalidAuthToken" in text or isinstance(error, AuthenticationError):
        return (
            "the cluster refuses this process's token, or it has none. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "~/.ray/auth_token (mode 600) to the head's token"
        )
    if "No node info found" in text:
        return (
            "this machine is not a node of that cluster, and a driver has to run on one. Submit the job "
            "(`ray job submit -- python ...`), or join with `ray start`"
        )
    return NO_ANSWER


def job_environment(variables: dict[str, str]) -> dict[str, str]:
    """Environment of every process of a job: ``variables``, quieter libraries, and access to object storage."""
    # storage has answered the driver by now: for other processes a silent server is an outage, not a wrong address
    patience = {RETRY_LIMIT_VARIABLE: str(RETRY_LIMIT_S)}
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1"} | patience | variables
    chosen = {name: os.environ.get(name, value) for name, value in own.items()}
    return chosen | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def local_variables() -> dict[str, str]:
    """Environment of the processes of a Ray cluster started on this machine: folders that they can use."""
    folder = ray_temp_folder()
    given = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    if given is not None and folder != Path(given):
        logger.warning(
            "TMPDIR %s is too long for the paths of Ray's sockets: Ray keeps its files in %s. RAY_TMPDIR sets another short "
            "folder",
            given,
            folder,
        )
    return {"RAY_TMPDIR": str(folder)}


NODE_TIMEOUT_S = 120.0
"""Longer than storage is retried, so that the error names the cause."""


def check_nodes(uris: Sequence[str]) -> None:
    """Raise if a node has other versions than the driver, or does not reach one of ``uris``.

    Raises:
        UserError: names the first such node and the fix.
    """
    nodes = cluster_checks.start_inspectors()
    lines = list(cluster_checks.version_checks(nodes, NODE_TIMEOUT_S))
    for uri in filter(storage.is_s3, uris):
        lines += cluster_checks.reach_checks(nodes, uri, NODE_TIMEOUT_S)
    failed = [line for line in lines if line.level == "failed"]
    if failed:
        others = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"node {failed[0].where}, {failed[0].subject}: {failed[0].detail}{others}. {failed[0].fix}. "
            "Run `python -m cmcgns.doctor` to check all nodes"
        )
