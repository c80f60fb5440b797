"""From which checkpoint a run resumes: the last one that is whole. Needs no torch, so that the driver can refuse early.

Ray Train keeps a list of a run's checkpoints, resumes from its last entry and deletes the others as they become too many. That
list is a file in the run folder, which others may have changed: it is checked, then written anew from the folders that are there.
"""

import json
import logging
import re
from collections.abc import Collection

from cmcgns import storage
from cmcgns.cluster import ray_private
from cmcgns.errors import UserError
from cmcgns.run_folder import RunFolder
from cmcgns.storage.integrity import damage

logger = logging.getLogger(__name__)
CHECKPOINT_FORMAT = FIRST_SHARDED = 3
"""2 since checkpoints have hashes; 3 since each rank writes its own part."""
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8})_of_(\d+)_[0-9a-f]{6}")
BEST = "best_"
"""Prefix of a copy that Ray Train does not know and never deletes."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list."""


def hashes_of(rank: int) -> str:
    """Name of the file with the hashes of what a rank has written."""
    return f"hashes_{rank}.json"


def checkpoint_damage(uri: str, name: str, part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the checkpoint ``name`` in the folder ``uri``; None if every file of every rank is what was written.

    Reads all of it, or with ``part`` (i, n) the files of every n-th rank from i on.
    """
    try:
        progress = json.loads(storage.read_bytes(storage.join(uri, "progress.json")))
        ranks, version = int(progress["ranks"]), int(progress["format"])
    except storage.MissingFileError:
        return "progress.json is missing"
    except (ValueError, KeyError, TypeError):
        return "progress.json is not what was written"
    if version == 1 and not storage.exists(storage.join(uri, hashes_of(0))):
        logger.warning("%s was written by an earlier version, without hashes: it is not verified", uri)
        return None
    if ranks != ranks_in_name(name):
        return "progress.json is not what was written"
    found = next(filter(None, (damage(uri, hashes_of(rank)) for rank in range(ranks)[part[0] :: part[1]])), None)
    if found is None and version > CHECKPOINT_FORMAT:
        return f"it has format {version}, and this version of cmcgns reads up to {CHECKPOINT_FORMAT}"
    return found


def ranks_in_name(name: str) -> int:
    """Number of ranks that wrote the checkpoint ``name``; -1 if that is not a checkpoint's name."""
    found = CHECKPOINT_NAME.fullmatch(name)
    return int(found[2]) if found else -1


def step_in_name(name: str) -> int:
    """The step of the checkpoint ``name``; 0 if that is not a checkpoint's name."""
    found = CHECKPOINT_NAME.fullmatch(name)
    return int(found[1]) if found else 0


def list_checkpoints(folder: RunFolder) -> list[str]:
    """Names of the checkpoints in the run folder by step, damaged ones included."""
    return sorted(name for name in storage.list_folders(folder.uri) if CHECKPOINT_NAME.fullmatch(name))


def latest_checkpoint(folder: RunFolder) -> str | None:
    """URI of the newest complete checkpoint in the folder, not verified."""
    complete = [
        uri for name in list_checkpoints(folder) if storage.exists(f"{(uri := folder.file(name))}/progress.json")
    ]
    return complete[-1] if complete else None


def find_checkpoint(folder: RunFolder, checkpoint_every: int) -> str | None:
    """Name of the checkpoint from which the run resumes, the last one that is whole; None if it has not written one yet.

    Raises:
        UserError: Ray Train's list names another place, or the run must have written a checkpoint and none is whole.
    """
    check_snapshot(folder)
    damaged: list[str] = []
    for name in reversed(list_checkpoints(folder)):
        reason = checkpoint_damage(folder.file(name), name)
        if reason is None:
            for line in damaged:
                logger.warning("%s. The run resumes from %s; delete the damaged one", line, name)
            return name
        damaged.append(f"{folder.file(name)} is damaged: {reason}")
    steps = last_step(folder)
    if damaged or steps > checkpoint_every:
        raise UserError(
            f"run.resume {folder.name}: metrics.jsonl has {steps} steps, but no whole checkpoint is left"
            f"{''.join(f'; {line}' for line in damaged)}. Restore one from a copy, or start a new run"
        )
    return None


def keep_best(uri: str, step: int) -> None:
    """Copy the checkpoint of ``step`` in the run folder ``uri`` to ``best_checkpoint_*``, and delete the best one before."""
    folders = storage.list_folders(uri)
    name = max(
        each for each in folders if CHECKPOINT_NAME.fullmatch(each) and each.startswith(f"checkpoint_{step:08d}_")
    )
    storage.copy_folder(storage.join(uri, name), storage.join(uri, f"{BEST}{name}"))
    for old in folders:
        if CHECKPOINT_NAME.fullmatch(old.removeprefix(BEST)) and old.startswith(BEST) and old != f"{BEST}{name}":
            storage.delete_folder(storage.join(uri, old))


def delete_half_written(folder: RunFolder, there_before: Collection[str], if_listed: bool = False) -> None:
    """Delete checkpoints whose writing failed: damaged, not listed by Ray Train, and not ``there_before``, since someone may
    still restore older ones. ``if_listed``: only if there is such a list."""
    try:
        listed = storage.read_bytes(folder.file(SNAPSHOT)).decode()
    except storage.MissingFileError:
        if if_listed:
            return
        listed = ""
    for name in list_checkpoints(folder):
        if name not in there_before and name not in listed and checkpoint_damage(folder.file(name), name) is not None:
            storage.delete_folder(folder.file(name))
            logger.warning("deleted %s, whose writing had failed", folder.file(name))


def last_step(folder: RunFolder) -> int:
    """The last step in the run's metrics; 0 if there is none."""
    uri = folder.file("metrics.jsonl")
    try:
        lines = storage.read_bytes(uri).splitlines()
    except storage.MissingFileError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
            continue
    return 0


def end_last_attempt(folder: RunFolder, checkpoint: str | None) -> None:
    """Say so if the last attempt of a resumed run was killed: it has left no result.json. One that is there is deleted, since
    this attempt will write its own unless it is killed too."""
    if storage.exists(folder.file("result.json")):
        storage.delete_file(folder.file("result.json"))
        return
    logger.warning(
        "run %s was killed after step %d, without a result: it %s",
        folder.name, last_step(folder), f"goes on from {checkpoint}" if checkpoint else "begins again",
    )  # fmt: skip


def check_snapshot(folder: RunFolder) -> None:
    """Raise ``UserError`` if Ray Train's list names anything but checkpoints of this run: Ray would delete it."""
    uri = folder.file(SNAPSHOT)
    try:
        snapshot = json.loads(storage.read_bytes(uri))
        results = [*snapshot["checkpoint_results"], *snapshot.get("pending_training_results", [])]
        names = [each["checkpoint_dir_name"] for each in [*results, snapshot.get("latest_checkpoint_result")] if each]
    except storage.MissingFileError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is damaged; it is written anew from the checkpoints in the folder", uri)
        return
    for name in names:
        if not isinstance(name, str) or not CHECKPOINT_NAME.fullmatch(name):
            raise UserError(
                f"{uri} lists {name!r} as a checkpoint, and Ray would delete that folder once it is too old; names of "
                "checkpoints are like checkpoint_00000100_of_2_0a1b2c. Find out who changed the file before you resume; to "
                "resume from the checkpoints in the run folder, delete it"
            )


def write_snapshot(folder: RunFolder, checkpoint: str | None) -> None:
    """Let Ray Train resume from ``checkpoint``, and know of the older ones."""
    if checkpoint is None:
        storage.delete_file(folder.file(SNAPSHOT))
        return
    known = [name for name in list_checkpoints(folder) if name < checkpoint]
    storage.write_bytes(folder.file(SNAPSHOT), ray_private.checkpoint_snapshot([*known, checkpoint]).encode())
