"""A run in which nothing happens says what it waits for."""

import io
import time

import pytest
import ray
from rich.console import Console

from cmcgns.cluster.coordinator import WORKER_STARTED, start_coordinator
from cmcgns.train import display
from cmcgns.train.display import Display, waits_for
from cmcgns.train.schedule import Schedule

pytestmark = pytest.mark.ray
NEEDED = [{"CPU": 64.0, "GPU": 8.0}]


def test_what_a_silent_run_waits_for_depends_on_what_its_workers_have_reached(local_ray: None) -> None:
    assert "Ray has not started the workers; the job needs 64 CPUs and 8 GPUs; the cluster has " in waits_for(
        {}, NEEDED
    )
    assert "workers import their libraries" in waits_for({WORKER_STARTED: 1.0}, NEEDED)
    films = waits_for({WORKER_STARTED: 1.0, "training": 2.0}, NEEDED)
    assert all(cause in films for cause in ("films", "this machine is busy", "the storage is slow"))


def test_a_run_without_a_step_says_so_again_and_again_more_rarely(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "SILENCE_S", 0.2)
    monkeypatch.setattr(display, "POLL_S", 0.05)
    coordinator, text = start_coordinator(1, 0.0, {}), io.StringIO()
    shown = Display(coordinator, Schedule(2, 0, 0), NEEDED, Console(file=text, width=200))
    end = time.monotonic() + 30
    while text.getvalue().count("no step after") < 2 and time.monotonic() < end:
        time.sleep(0.05)
    ray.get(
        coordinator.update.remote(
            {
                "step": 1,
                "split": "train",
                "stage": 1,
                "step_s": 1.0,
                "data_wait_s": 0.0,
                "pool_wait_s": 0.0,
                "studies_per_s": 1.0,
            }
        )
    )
    time.sleep(1.0)
    said = text.getvalue().count("no step after")
    time.sleep(1.0)
    shown.close()
    assert text.getvalue().count("no step after") == said >= 2
