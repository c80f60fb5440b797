"""Runs any job; a subclass of ``Job`` adds what is specific to it.

Order: ``__init__`` refuses wrong settings before Ray starts; then the job connects to Ray, prints the plan and checks the
cluster; ``run`` does the work; ``result.json`` and the last lines report the outcome, also after Ctrl-C and failures.
"""

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any, ClassVar

import ray
from rich.console import Console

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED, STATUS_INTERRUPTED, STATUS_TERMINATED, invocation
from cmcgns.cluster.coordinator import memory_failure
from cmcgns.cluster.head_watch import watch_head
from cmcgns.cluster.session import ONE_CPU, ray_session
from cmcgns.errors import UserError, cause
from cmcgns.lease import hold
from cmcgns.run_folder import RunFolder, warn_if_temporary
from cmcgns.signals import sigterm_as_ctrl_c
from cmcgns.terminal import console, log_on, print_plan, quiet_terminal

STATUS = {"finished": 0, "failed": STATUS_FAILED, "stopped": STATUS_INTERRUPTED}
"""Exit status of a job by the status in its result."""


class Job(ABC):
    """One run of a job. ``__init__`` checks settings and run folder and raises ``UserError``; it writes nothing."""

    script: ClassVar[str]
    """Name of the file in jobs/, for the command that resumes."""
    resume_key: ClassVar[str] = "run.resume"
    """The setting that resumes a run; '' if the job cannot be resumed."""
    resumes_from: ClassVar[str] = "the last checkpoint"
    packages: ClassVar[tuple[str, ...]] = ("cmcgns", "ray", "torch", "transformers", "pyarrow", "numpy")
    """Packages whose versions are recorded in result.json."""
    folder: RunFolder

    def environment(self) -> dict[str, str]:
        """Environment variables for all of the job's processes."""
        return {}

    def uris(self) -> Sequence[str] | None:
        """URIs that every node must reach; None if the nodes are not checked."""
        return None

    def needed(self) -> list[dict[str, float]]:
        """Resource bundles that the job waits for on a cluster with an autoscaler."""
        return [ONE_CPU]

    @abstractmethod
    def plan(self, cpus: float) -> dict[str, str]:
        """What will run, where, and with which resources, on a cluster with ``cpus`` CPUs."""

    def check_cluster(self, cpus: float) -> None:  # noqa: B027
        """Raise ``UserError`` with the numbers if the cluster is too small for the plan."""

    @abstractmethod
    def run(self, terminal: Console) -> dict[str, Any]:
        """Do the work. Returns the content of result.json; its ``status`` defaults to finished."""

    def reason(self, error: Exception) -> str:
        """Message for an error that ended ``run``."""
        return cause(error)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        versions = {name: metadata.version(name) for name in self.packages}
        self.folder.write_json("result.json", result | {"versions": versions})

    @abstractmethod
    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        """The last lines of a finished run: results and where they are stored."""

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        """Print how the run ended, and if it did not finish the command that resumes it."""
        if result["status"] == "finished":
            print_plan(terminal, self.summary(result))
            return
        if result.get("failure"):
            terminal.print("failed:", result["failure"], style="red", highlight=False, markup=False)
        else:
            terminal.print("stopped", style="yellow", highlight=False)
        if self.resume_key:
            terminal.print(self.next_step(result), highlight=False, markup=False)

    def next_step(self, result: dict[str, Any]) -> str:
        """What to do after a run that did not finish."""
        return f"resume from {self.resumes_from} with: {self.resume_command()}"

    def resume_command(self) -> str:
        """The command that continues this run, quoted for a shell."""
        settings = {"run.storage": self.folder.storage, self.resume_key: self.folder.name} | self.modules()
        return shlex.join([*invocation(self.script), *(f"--{key}={value}" for key, value in settings.items())])

    def modules(self) -> dict[str, str]:
        """The user's own modules in the settings, which resuming has to name again (``cli.load_config``)."""
        return {}


def run(job: Job, dry_run: bool = False) -> int:
    """Exit status of ``job``: 0 finished, 1 failed, 130 stopped by Ctrl-C or 143 by SIGTERM with everything saved.

    A ``dry_run`` prints the plan and checks the cluster; it writes nothing and requests nothing from an autoscaler.
    """
    terminal, needed = console(), [] if dry_run else job.needed()
    with (
        quiet_terminal(),
        log_on(terminal),
        ray_session(job.environment(), job.uris(), needed) as cpus,
        sigterm_as_ctrl_c() as sigterm,
    ):
        print_plan(terminal, job.plan(cpus))
        job.check_cluster(cpus)
        warn_if_temporary(terminal, job.folder)
        if dry_run:
            return 0
        with (
            hold(job.folder.uri, f"run {job.folder.name} in {job.folder.storage}"),
            watch_head(lambda message: end_without_head(job, terminal, message)),
        ):
            result = outcome(job, terminal)
            try:
                job.write_result(result)
            except storage.FullDiskError as error:
                result = {"failure": str(error)} | result | {"status": "failed"}
        job.report(terminal, result)
        return STATUS_TERMINATED if sigterm.received and result["status"] == "stopped" else STATUS[result["status"]]


def end_without_head(job: Job, terminal: Console, message: str) -> None:
    """End this process with the result of a failed run. Nothing of Ray can be used, not even its shutdown."""
    result = {"status": "failed", "failure": message}
    try:
        with suppress(UserError):
            job.write_result(result)
        job.report(terminal, result)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(STATUS["failed"])


def outcome(job: Job, terminal: Console) -> dict[str, Any]:
    """The result of the job's work, with ``status`` finished, stopped or failed."""
    try:
        return {"status": "finished"} | job.run(terminal)
    except KeyboardInterrupt:
        return {"status": "stopped"}
    except storage.FullDiskError as error:  # not a mistake in the settings, and something may be done already
        return {"status": "failed", "failure": cause(error)}
    except UserError:
        raise
    except Exception as error:  # Ray wraps errors of tasks and actors in several types
        return {"status": "failed", "failure": memory_failure() or job.reason(error)}


def check_capacity(
    section: str, member: str, count: int, cpus_each: float, gpus_each: float, kept: float = 0.0, least: float = 0.0
) -> None:
    """Raise ``UserError`` if ``count`` workers or actors of ``section`` do not fit on the cluster besides ``kept`` CPUs for data.

    ``least``: minimum number of CPUs besides ``kept``, for the job's other tasks.
    """
    resources = ray.cluster_resources()
    cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    wanted = max(count * cpus_each, least)
    name = f"{section}.{member}s"
    if wanted + kept > cpus:
        data = f" and {kept:g} are reserved for data" if kept else ""
        raise UserError(
            f"{name} {count} of {cpus_each:g} CPUs need {wanted:g}; the cluster has {cpus:g}{data}. Lower {name} or "
            f"{section}.cpus_per_{member}"
        )
    if count * gpus_each > gpus:
        raise UserError(f"{name} {count} of {gpus_each:g} GPUs need more than the cluster's {gpus:g}. Lower {name}")
