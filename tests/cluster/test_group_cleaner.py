"""A controller that is lost leaves nothing behind on the head, also where another cluster runs on that machine."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

from cmcgns.cluster.group_cleaner import OwnClusterCleaner
from tests.ray_head import RayHead

pytestmark = pytest.mark.ray
OF_ANOTHER_CLUSTER = ("raylet", "-c", "import time; time.sleep(600)", "--gcs-address=192.0.2.99:6379")
"""A command by which Ray finds a cluster of the machine."""


class Controller:
    """Stands for Ray Train's: an actor that is killed."""

    def pid(self) -> int:
        return os.getpid()


def test_the_actor_that_watches_a_controller_ends_with_it_beside_another_cluster(
    ray_head: RayHead, local_ray: None
) -> None:
    """Ray's own stays; once it does not, ours can go."""
    other = subprocess.Popen(OF_ANOTHER_CLUSTER, executable=sys.executable)  # first: a process of Ray looks only once
    try:
        controller = ray.remote(Controller).options(num_cpus=0).remote()
        ray.get(controller.pid.remote())
        pids: dict[type, int] = {}
        for kind in (PlacementGroupCleaner, OwnClusterCleaner):
            cleaner = ray.remote(num_cpus=0)(kind).options(lifetime="detached")
            actor = cleaner.remote(controller._actor_id.hex(), 0.1, 5, 2.0)
            pids[kind] = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
            ray.get(actor.start_monitoring.remote())
        ray.kill(controller)
        end = time.monotonic() + 60
        while psutil.pid_exists(pids[OwnClusterCleaner]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not psutil.pid_exists(pids[OwnClusterCleaner])
        assert psutil.pid_exists(pids[PlacementGroupCleaner])
    finally:
        other.kill()
        other.wait()
    psutil.Process(pids[PlacementGroupCleaner]).kill()
