"""Whether a machine reaches the run's data and storage, and how fast."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass

from cmcgns.data import storage
from cmcgns.data.faults import PATIENCE_VARIABLE
from cmcgns.errors import UserError, first_line

PROBE = ".doctor-"
"""What the names of our own files in run.storage begin with."""


@dataclass(frozen=True)
class Reached:
    """What came of one look at a folder or bucket: its speed, or why there is none."""

    error: str = ""
    read_mib_s: float | None = None
    write_mib_s: float | None = None
    sees_driver: bool = True
    """Whether the file that the driver left is there."""


def look_at_data(uri: str) -> Reached:
    """Whether something lies at ``uri``."""
    _impatient()
    try:
        return Reached() if storage.exists(uri) else Reached(error="nothing lies there")
    except (UserError, OSError) as error:
        return Reached(error=first_line(error))


def look_whether_reached(uri: str) -> Reached:
    """Whether ``uri`` can be asked for, be something there or not; as patient with a busy bucket as the job itself."""
    try:
        storage.exists(uri)
    except (UserError, OSError) as error:
        return Reached(error=first_line(error))
    return Reached()


def look_at_storage(uri: str, mark: str, mebibytes: int) -> Reached:
    """Speed of writing and reading a file in the folder ``uri``, in which the driver left the file ``mark``."""
    _impatient()
    probe = storage.join(uri, f"{mark}-{os.getpid()}-{time.time_ns()}")
    data = os.urandom(2**20) * mebibytes
    try:
        sees_driver = storage.exists(storage.join(uri, mark))
        began = time.perf_counter()
        storage.write_bytes(probe, data)
        written = time.perf_counter()
        whole = storage.read_bytes(probe) == data
        read = time.perf_counter()
    except (UserError, OSError) as error:
        return Reached(error=first_line(error))
    finally:
        with suppress(UserError, OSError):
            storage.delete_file(probe)
    fault = "" if whole else "what was read is not what was written"
    return Reached(fault, mebibytes / (read - written), mebibytes / (written - began), sees_driver)


def _impatient() -> None:
    """The doctor asks once: a bucket that answers only after minutes has failed."""
    os.environ[PATIENCE_VARIABLE] = "5"
