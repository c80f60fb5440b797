"""A cluster of pretend machines, brought up as a user brings it up: by `ray up cluster/on_prem.yaml`, typed on ``op``."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.jobs import REPOSITORY, Running
from tests.rehearsal.hosts import OPERATOR, Host, in_repository, running_hosts

FILE = REPOSITORY / "cluster" / "on_prem.yaml"
TOKEN = {"RAY_AUTH_MODE": "token"}
UP_S, JOB_S = 180, 900
TINY_GRADIENTS = 2.1e6 * 4
"""Bytes of the gradients of tests.jobs.TINY's model."""


@dataclass(frozen=True)
class Cluster:
    """Machines with Ray on them; ``hosts[OPERATOR]`` has none."""

    folder: Path
    hosts: dict[str, Host]
    file: Path

    @property
    def operator(self) -> Host:
        return self.hosts[OPERATOR]

    @property
    def head(self) -> Host:
        return self.hosts["h1"]

    @property
    def environment(self) -> dict[str, str]:
        """What a user exports to submit jobs from the operator's machine."""
        return TOKEN | {"RAY_API_SERVER_ADDRESS": f"http://{self.head.address}:8265"}

    def ray(self, *words: str, check: bool = True, timeout_s: float = UP_S) -> Any:
        """`ray ...` on the operator's machine, in the repository."""
        line = in_repository("ray", *words)
        return self.operator.run(*line, check=check, timeout_s=timeout_s, environment=self.environment)

    def submit(self, *words: str, options: Sequence[str] = (), timeout_s: float = JOB_S) -> Any:
        """`ray job submit OPTIONS -- ...`: the job's output and what Ray says of its end; status 0 where it SUCCEEDED."""
        return self.ray("job", "submit", *options, "--", *words, check=False, timeout_s=timeout_s)

    def start_job(self, *words: str) -> Running:
        """`ray job submit -- ...`, left running."""
        line = in_repository("ray", "job", "submit", "--", *words)
        return Running(self.folder, self.operator.command(*line, environment=self.environment))

    def nodes(self) -> list[str]:
        """Names of the nodes that the head holds for alive."""
        script = (
            "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
            "print(json.dumps(sorted(n['NodeManagerHostname'] for n in ray.nodes() if n['Alive'])))"
        )
        said = self.head.run("python", "-c", script, environment=TOKEN).stdout
        return list(json.loads(said.splitlines()[-1]))

    def wait_for_nodes(self, names: Sequence[str]) -> None:
        """Wait until the head holds these for alive and no others."""
        end = time.monotonic() + UP_S
        while (found := self.nodes()) != sorted(names):
            assert time.monotonic() < end, f"nodes {found}, not {names}"


def make_token(operator: Host) -> None:
    """What the cluster files say to type first."""
    operator.run("bash", "-c", "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token", environment=TOKEN)


def filled_in(folder: Path, hosts: dict[str, Host]) -> Path:
    """A copy of cluster/on_prem.yaml with what a user has to change: addresses, login, and the repository's path."""
    text = FILE.read_text().replace("CMCGNS=/srv/cmcgns", f"CMCGNS={REPOSITORY}")
    assert str(REPOSITORY) in text
    settings = yaml.safe_load(text)
    workers = [host.address for name, host in hosts.items() if name not in (OPERATOR, "h1")]
    settings["provider"] |= {"head_ip": hosts["h1"].address, "worker_ips": workers}
    settings["auth"]["ssh_user"] = "root"
    path = folder / "on_prem.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@contextmanager
def running_cluster(folder: Path, count: int = 3) -> Iterator[Cluster]:
    """``count`` machines under Ray, with a token; all gone at the end."""
    with running_hosts(folder, count) as hosts:
        cluster = Cluster(folder, hosts, filled_in(folder, hosts))
        make_token(cluster.operator)
        said = cluster.ray("up", "--yes", str(cluster.file)).stdout
        (folder / "ray_up.log").write_text(said)
        cluster.wait_for_nodes([name for name in hosts if name != OPERATOR])  # `ray up` waits for the head alone
        yield cluster
