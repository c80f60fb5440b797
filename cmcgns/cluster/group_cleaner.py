"""Ray Train's watch over a controller, which ends with it.

For each controller Ray (2.60) starts a detached actor that removes its placement group if it is killed. Its thread and its method
`stop` both want to end the actor, and get in each other's way: in half an hour of faults on a busy machine six of them stayed,
some 100 MB each. This uses Ray's private API, apart from ``ray_private`` since processes that read films must not import Ray
Train. Torch is not imported here: the actor does without.
"""

import logging
from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

logger = logging.getLogger(__name__)


class EndingCleaner(PlacementGroupCleaner):
    """The actor: it watches until the controller is gone or its work is no longer needed, and its process ends then."""

    def _monitor_loop(self) -> None:
        while not self._stop_event.is_set():
            try:
                super()._monitor_loop()
            except Exception:
                logger.exception("the watch over a controller failed, and goes on")

    def _exit(self) -> None:
        if not self._stop_event.is_set():  # the thread's work is done; an actor can only exit in a method
            ray.get_runtime_context().current_actor.stop.remote()

    def stop(self) -> None:
        """End the actor."""
        self._stop_event.set()
        ray.actor.exit_actor()


class EndingCleanerCallback(PlacementGroupCleanerCallback):
    """Starts ``EndingCleaner`` in the controller's process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = EndingCleaner
        super().after_controller_start(train_run_context)


def with_an_end(callbacks: list[Any]) -> list[Any]:
    """Ray Train's ``callbacks`` with an ``EndingCleaner`` in place of its own."""
    return [EndingCleanerCallback() if type(each) is PlacementGroupCleanerCallback else each for each in callbacks]
