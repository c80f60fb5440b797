"""A data centre behind a mock AWS: where moto says that an instance runs, a pretend machine does, under the address of moto.

A mock proves nothing of real rights, quotas or capacity; it does prove the way from `ray up` to a job that brings workers up.
"""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from tests.rehearsal.hosts import Switch

RUNS, GONE = ("pending", "running"), ("shutting-down", "terminated")
TYPE_TAG = "ray-user-node-type"


@dataclass(frozen=True)
class Instance:
    """An instance as the mock describes it."""

    id: str
    address: str
    state: str
    node_type: str
    """By the cluster file's names."""


class DataCentre:
    """Switches machines on and off as the account's instances come and go."""

    def __init__(self, switch: Switch, key: Path, profile: str) -> None:
        self.failure: BaseException | None = None
        self._switch, self._key, self._profile = switch, key, profile
        self._ec2 = boto3.client("ec2")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def instances(self) -> list[Instance]:
        """All that there ever were, oldest first."""
        pages = self._ec2.get_paginator("describe_instances").paginate()
        found = [each for page in pages for group in page["Reservations"] for each in group["Instances"]]
        return [_instance(each) for each in sorted(found, key=lambda each: each["LaunchTime"])]

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._closing.wait(0.5):
                for instance in self.instances():
                    self._follow(instance)
        except BaseException as error:
            self.failure = error

    def _follow(self, instance: Instance) -> None:
        host = self._switch.hosts.get(name := instance.id[:8])  # a cable's name may have 15 letters
        if instance.state in RUNS and host is None:
            public = subprocess.run(["ssh-keygen", "-y", "-f", self._key], capture_output=True, text=True, check=True)
            self._switch.add(name, instance.address, public.stdout, self._profile).boot()
        elif instance.state in GONE and host is not None and host.processes():
            host.power_off()


def _instance(described: dict[str, Any]) -> Instance:
    tags = {tag["Key"]: tag["Value"] for tag in described.get("Tags", [])}
    address = described.get("PrivateIpAddress", "")
    return Instance(described["InstanceId"], address, described["State"]["Name"], tags.get(TYPE_TAG, ""))


@contextmanager
def running_data_centre(switch: Switch, key: Path, profile: str) -> Iterator[DataCentre]:
    """A data centre for the account that the environment names; ``key`` is the private key of its instances."""
    centre = DataCentre(switch, key, profile)
    try:
        yield centre
    finally:
        centre.close()
