"""Ray Train's watch over a controller, on a machine with several clusters.

For each controller Ray (2.60) starts a detached actor that removes its placement group if it is killed, and ends then. It asks
for the controller's state without saying in which cluster: if two of them run on the head's machine, an error ends its watch,
and its process stays for good. This uses Ray's private API, apart from ``ray_private`` since processes that read films must not
import Ray Train. Torch is not imported here: the actor does without.
"""

import os
from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


class OwnClusterCleaner(PlacementGroupCleaner):
    """The actor: it asks the cluster that it belongs to."""

    def start_monitoring(self) -> bool:
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        return bool(super().start_monitoring())


class OwnClusterCallback(PlacementGroupCleanerCallback):
    """Starts ``OwnClusterCleaner`` from the controller's process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = OwnClusterCleaner
        super().after_controller_start(train_run_context)


def in_own_cluster(callbacks: list[Any]) -> list[Any]:
    """Ray Train's ``callbacks`` with an ``OwnClusterCleaner`` in place of its own."""
    return [OwnClusterCallback() if type(each) is PlacementGroupCleanerCallback else each for each in callbacks]
