"""Memory that runs out is named with amounts and what to lower, whichever of Ray's errors it shows up as."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray
DRIVER = """
import ray
from cmcgns.cluster.coordinator import memory_failure
from cmcgns.cluster.session import ray_session

with ray_session():
    print("before:", memory_failure())
    try:
        ray.get(ray.remote(max_retries=0)(lambda: bytearray(2**28) and __import__("time").sleep(60)).remote())
    except ray.exceptions.RayError:
        print("after:", memory_failure())
"""


def test_a_process_that_ray_kills_for_memory_is_reported_with_the_amounts(
    home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, check=False, timeout=180)
    assert "before: None" in done.stdout, done.stderr
    after = done.stdout.partition("after: ")[2]
    assert "memory ran out on node" in after
    assert "GB were in use, and Ray killed" in after
    assert "Lower train.microbatch_size" in after
