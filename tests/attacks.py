"""What other users of a machine may try with a run that starts there: modules beside the data, ports, the token of its Ray."""

import stat
from pathlib import Path

import psutil

from tests.jobs import Job

BESIDE_THE_DATA = (
    "select", "socketserver", "random", "secrets", "threading", "numpy", "yaml", "torch", "ray", "errors",
)  # fmt: skip
"""Names of modules that any Python program may import."""


def mode(path: Path) -> int:
    """Permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def plant_modules(folder: Path, marks: Path) -> None:
    """Write modules to ``folder`` that leave a file in ``marks`` when they are executed."""
    folder.mkdir()
    marks.mkdir()
    for name in BESIDE_THE_DATA:
        (folder / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()\nraise SystemExit('attacked')\n")


def check_ports(job: Job) -> None:
    """Nothing of a local run and its Ray listens beyond this machine, but for one port of torch's."""
    running = [psutil.Process(job.process.pid), *job.processes("")]
    names = {process.pid: process.name() for process in running if process.is_running()}
    listening = [
        (found.laddr.ip, names[found.pid])
        for found in psutil.net_connections("inet")
        if found.status == psutil.CONN_LISTEN and found.pid in names
    ]
    assert len(listening) > 10
    open_to_others = [each for each in listening if each[0].removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    # torch's store takes no address to listen on: docs/security.md
    assert {name for _, name in open_to_others} <= {"ray::RayTrainWorker", "ray::RayTrainWo"}, open_to_others
    assert len(open_to_others) <= 1
