"""All uses of Ray's private API, one function each; tests/cluster/test_ray_private.py names the one that a new Ray breaks."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.experimental.internal_kv import _internal_kv_get

AUTOSCALER_KEY = b"AutoscalerMetricsAddress"
"""Set in the head's key-value store by its autoscaler process. `ray start` always starts one, KubeRay only if configured."""


def has_autoscaler() -> bool:
    """Whether an autoscaler process runs on the head. The public `ray.autoscaler.sdk` only sends requests to one."""
    return _internal_kv_get(AUTOSCALER_KEY) is not None


def local_cluster(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ray.init` for a new cluster on this machine. Its public arguments do not cover Ray's core ``settings``."""
    return {"address": "local", "_system_config": settings}


@contextmanager
def loopback_only() -> Iterator[None]:
    """A cluster started inside listens on the loopback interface alone. `ray.init` replaces a loopback address by another one,
    except where Ray assumes one machine: by default on Windows and macOS."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    if given is None:
        os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # the variable is for Ray's other processes
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_process_groups() -> Iterator[None]:
    """A cluster started inside does not get the signals of this process's group, such as the SIGTERM of `timeout`: Ray blocks
    SIGINT alone in its processes, and has no setting for others."""
    before = services.ConsolePopen

    class Popen(before):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, process_group=0)

    services.ConsolePopen = Popen
    try:
        yield
    finally:
        services.ConsolePopen = before


def ignore_uv() -> None:
    """Let Ray start its processes with this Python, also under `uv run`: its hook builds an environment without the driver's
    packages. The variable that turns it off is read when Ray is imported."""
    if ray_constants.env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", False):  # the user asks for the hook
        return
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def execution_callback() -> type[Any]:
    """Base class for `DataContext.custom_execution_callback_classes`: that setting is public, the class is not."""
    # imported here: processes that only need this file's other functions must not load ray.data
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return ExecutionCallback


def set_num_cpus(dataset: Any, cpus: float) -> Any:
    """``dataset`` whose last operator asks for ``cpus``: `ray.data.range` and `repartition` have no argument for it."""
    dataset._logical_plan.dag.ray_remote_args["num_cpus"] = cpus
    return dataset


def unlimit_generator_buffer(context: Any) -> None:
    """Let a Ray Data task that waits for buffer space finish and free its CPU. No public setting of `DataContext` does this."""
    context._max_num_blocks_in_streaming_gen_buffer = None


def set_total_resources(executor: Any, resources: Callable[[], dict[str, float]]) -> None:
    """Make a Ray Data executor plan with ``resources``: public options can only subtract from the CPUs that Ray assigns it."""
    executor._resource_manager._get_total_resources = lambda: ray.data.ExecutionResources.from_resource_dict(
        resources()
    )


def checkpoint_snapshot(names: Sequence[str]) -> str:
    """Ray Train's list of a run's checkpoints ``names``, oldest first; it offers no way to say from which one to resume."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    results = [_TrainingResultState(checkpoint_dir_name=name, metrics={}) for name in names]
    return str(
        _CheckpointManagerState(
            checkpoint_results=results,
            checkpoint_report_indices=list(range(len(names))),
            latest_checkpoint_result=results[-1],
            pending_training_results=[],
            pending_validation_specs=[],
            current_report_index=len(names),
            validated_checkpoint_dir_names=[],
            timed_out_validation_checkpoint_dir_names=[],
            failed_validation_checkpoint_dir_names=[],
        ).json()
    )
