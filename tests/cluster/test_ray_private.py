"""Each use of Ray's private API still does what it is for: the test that fails names what a new Ray has changed."""

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cmcgns.cluster import ray_private, session
from cmcgns.errors import UserError

pytestmark = pytest.mark.ray
SEEN: list[float] = []


class Spy(ray_private.execution_callback()):  # type: ignore[misc]
    """Gives a Ray Data executor 77 CPUs and notes how many it then plans with."""

    def before_execution_starts(self, executor: Any) -> None:
        ray_private.set_total_resources(executor, lambda: {"CPU": 77.0})

    def on_execution_step(self, executor: Any) -> None:
        SEEN.append(executor._resource_manager.get_global_limits().cpu)


def last_operator(dataset: Any) -> Any:
    return dataset._logical_plan.dag


def test_local_cluster_is_taken_by_ray_init() -> None:
    with ray.init(num_cpus=1, **ray_private.local_cluster({"free_objects_period_milliseconds": 100})):
        assert ray.cluster_resources()["CPU"] == 1


def test_importing_the_file_loads_neither_ray_data_nor_torch() -> None:
    """Clustering actors import it: both would cost each of them seconds and memory; ray.data makes pyarrow unpickle columns."""
    code = "import sys, cmcgns.clustering.bank, cmcgns.cluster.session; assert not {'ray.data', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_ray_that_does_not_start_in_time_is_one_message(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    said = "The current node timed out during startup."
    assert said in inspect.getsource(ray._private.node)

    def start(**settings: Any) -> None:
        raise Exception(said)

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(UserError, match=r"Ray did not start on this machine within 30 s \(load \d+ on \d+ CPUs\)"):
        session._connect(None, {})


def test_processes_of_a_local_cluster_are_in_groups_of_their_own() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with ray_private.own_process_groups(), ray.init(num_cpus=1, **ray_private.local_cluster({})):
        ray.get(ray.remote(lambda: None).remote())  # starts a worker
        made = {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert len(made) >= 3
        assert os.getpgrp() not in {os.getpgid(pid) for pid in made}


def test_ignore_uv_lets_ray_start_its_processes_with_this_python(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(
        "from ray._private.worker import _maybe_modify_runtime_env as chosen\n"
        "from cmcgns.cluster import ray_private\n"
        "print('py_executable' in chosen({}, False))\n"
        "ray_private.ignore_uv()\n"
        "print(chosen({}, False))\n"
    )
    # a shell whose command line is that of `uv run`, by which Ray recognises it
    (tmp_path / "run").write_text(f"PYTHONPATH={Path(__file__).parents[2]} {sys.executable} driver.py; exit $?\n")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '0'\n")
    command = ["uv", "run", sys.executable, "driver.py"]
    done = subprocess.run(command, executable="/bin/bash", cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "{}"], done.stderr


def test_has_autoscaler_finds_the_key_that_the_autoscaler_of_every_head_sets(local_ray: None) -> None:
    end = time.monotonic() + 20
    while not ray_private.has_autoscaler() and time.monotonic() < end:
        time.sleep(0.2)
    assert ray_private.has_autoscaler()
    kept = _internal_kv_get(ray_private.AUTOSCALER_KEY)
    _internal_kv_del(ray_private.AUTOSCALER_KEY)
    assert not ray_private.has_autoscaler()
    _internal_kv_put(ray_private.AUTOSCALER_KEY, kept)  # other tests use this Ray


def test_set_num_cpus_reaches_a_range_and_a_repartition(local_ray: None) -> None:
    rows = ray_private.set_num_cpus(ray.data.range(4, override_num_blocks=2), 0.5)
    assert last_operator(rows).ray_remote_args["num_cpus"] == 0.5
    parts = ray_private.set_num_cpus(rows.repartition(target_num_rows_per_block=2, strict=True), 0.25)
    assert last_operator(parts).ray_remote_args["num_cpus"] == 0.25
    assert sorted(row["id"] for row in parts.take_all()) == [0, 1, 2, 3]


def test_unlimit_generator_buffer_sets_a_field_that_ray_data_has(local_ray: None) -> None:
    context = ray.data.DataContext.get_current().copy()
    assert context._max_num_blocks_in_streaming_gen_buffer is not None
    ray_private.unlimit_generator_buffer(context)
    assert context._max_num_blocks_in_streaming_gen_buffer is None


def test_execution_callback_and_set_total_resources_change_what_an_executor_plans_with(local_ray: None) -> None:
    context = ray.data.DataContext.get_current().copy()
    context.custom_execution_callback_classes = [Spy]
    with ray.data.DataContext.current(context):
        assert ray.data.range(4).map_batches(lambda batch: batch).count() == 4
    assert SEEN
    assert SEEN[-1] > 2, "the local cluster has 2 CPUs"
