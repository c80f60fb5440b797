"""The Ray that a job runs on: the cluster that the environment names, or one of this machine alone."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from cmcgns.data.faults import PATIENCE_S, PATIENCE_VARIABLE

LOCAL_CLUSTER = {
    # data tasks come in bursts: keep their processes, and what they have imported, between epochs
    "idle_worker_killing_time_threshold_ms": 600_000,
    "num_workers_soft_limit": 16,
    # by default what the stream has done with stays in the object store for up to a second
    "free_objects_period_milliseconds": 100,
}
"""Settings of a Ray made for one run on this machine."""


@contextmanager
def ray_session(variables: dict[str, str] | None = None) -> Iterator[float]:
    """CPUs of the Ray cluster that the environment names, or of one made on this machine for the job.

    ``variables`` are environment variables for all its processes; what the environment says already comes first.
    """
    environment = job_environment(variables or {})
    os.environ.update(environment)
    ours = not ray.is_initialized()
    if ours:
        # a submitted job hands on by itself what it was submitted with, and Ray takes no variable twice
        own = {name: environment[name] for name in environment.keys() - submitted_variables().keys()}
        settings: dict[str, Any] = {"runtime_env": {"env_vars": own}}
        if not os.environ.get("RAY_ADDRESS"):
            settings = {"address": "local", "_system_config": LOCAL_CLUSTER}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it also raises
    try:
        yield float(ray.cluster_resources().get("CPU", 0))
    finally:
        if ours:
            ray.shutdown()


def submitted_variables() -> dict[str, str]:
    """Environment variables in the runtime environment that this job was submitted with, if it was."""
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    variables: dict[str, str] = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return variables


def job_environment(variables: dict[str, str]) -> dict[str, str]:
    """Environment of every process of a job: ``variables``, what keeps libraries quiet, and access to object storage."""
    # the driver has had its answer by now: to other processes a silent server is a fault, not a wrong address
    patience = {PATIENCE_VARIABLE: str(PATIENCE_S)}
    own = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"} | patience | variables
    chosen = {name: os.environ.get(name, value) for name, value in own.items()}
    return chosen | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
