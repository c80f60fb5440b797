"""Run folders, new or resumed, on local disk or in a bucket."""

import json
import re
import secrets
import shlex
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cmcgns import storage
from cmcgns.cli import to_yaml
from cmcgns.config import RunConfig, Section
from cmcgns.errors import UserError, with_prefix

EXPORT_HASHES = "hashes.json"
"""File of an export with the hashes of its other files."""


@dataclass(frozen=True)
class RunFolder:
    """The folder to which one run writes everything."""

    storage: str
    """Absolute folder or ``s3://`` URI that contains run folders."""
    name: str
    resumed: bool

    @property
    def uri(self) -> str:
        """URI of the folder."""
        return storage.join(self.storage, self.name)

    @property
    def is_temporary(self) -> bool:
        """True inside Ray's copy of the working directory of a submitted job, which Ray may delete at any time."""
        return "working_dir_files" in Path(self.uri).parts

    def file(self, name: str) -> str:
        """URI of a file in the folder."""
        return storage.join(self.uri, name)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as indented JSON."""
        storage.write_bytes(self.file(name), (json.dumps(value, indent=1) + "\n").encode())


def automatic_name(job: str) -> str:
    """Name of a run that was given none: the job, the time, and a suffix, since two may start in the same second."""
    return f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def is_automatic_name(name: str, job: str) -> bool:
    """Whether ``automatic_name`` made ``name`` for ``job``; earlier versions added no suffix."""
    return re.fullmatch(rf"{job}-\d{{8}}-\d{{6}}(-[0-9a-f]{{4}})?", name) is not None


def open_folder(run: RunConfig, job: str, resume_key: str = "run.resume") -> RunFolder:
    """The folder of ``run``, see ``find_folder``; resuming a finished run raises ``UserError``."""
    folder = find_folder(run, job, resume_key)
    if folder.resumed and has_finished(folder):
        raise UserError(
            f"run.resume {folder.name}: that run has finished; its result is in {folder.uri}. Start a new run"
        )
    return folder


def find_folder(run: RunConfig, job: str, resume_key: str = "run.resume") -> RunFolder:
    """The folder of ``run``; without a name it gets an ``automatic_name``.

    ``resume_key`` is the setting that resumes, or '' if the job cannot be resumed.

    Raises:
        UserError: the name is taken, or the run to resume does not exist.
    """
    # absolute: workers run in another folder
    root = run.storage
    if not storage.is_s3(root):
        root = str(Path(storage.absolute("run.storage", root)).resolve())
    name = run.resume or run.name or automatic_name(job)
    folder = RunFolder(root.rstrip("/"), name, resumed=run.resume is not None)
    try:
        exists = storage.exists(folder.file("config.yaml"))
        if storage.is_s3(root) and not exists:
            # raises for a missing bucket; storage.exists just returns False
            with suppress(storage.MissingFileError):
                storage.list_folders(root)
    except UserError as error:
        raise UserError(f"run.storage {with_prefix(run.storage, str(error))}") from None
    if folder.resumed and not exists:
        raise UserError(f"{resume_key} {name}: there is no run of that name in {root}; check run.storage")
    if not folder.resumed and exists:
        raise UserError(name_taken(folder, resume_key, job))
    return folder


def name_taken(folder: RunFolder, resume_key: str = "run.resume", job: str = "") -> str:
    """Error message for a new run whose name is taken."""
    name = folder.name
    if has_finished(folder):
        look = f", or look at it with: cmcgns report {shlex.quote(folder.uri)}" if job == "pretrain" else ""
        return f"run.name {name} is taken in {folder.storage} by a run that has finished; choose another{look}"
    hint = f", or resume that run with --{resume_key}={name}" if resume_key else ""
    return f"run.name {name} is taken in {folder.storage}; choose another{hint}"


def write_config(folder: RunFolder, config: Section, resume_key: str = "run.resume") -> None:
    """Write config.yaml: the resolved settings, which can be passed to --config.

    Raises:
        UserError: a new run's name was taken during its setup.
    """
    written = storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode(), if_absent=not folder.resumed)
    if not written:
        raise UserError(name_taken(folder, resume_key))


def has_finished(folder: RunFolder) -> bool:
    """True if result.json says that the run has finished."""
    uri = folder.file("result.json")
    return storage.exists(uri) and json.loads(storage.read_bytes(uri)).get("status") == "finished"


def refuse_changes(config: Section, folder: RunFolder, free_to_change: Mapping[str, Collection[str]]) -> None:
    """Raise ``UserError`` if a setting differs from the one the run started with and is not in ``free_to_change``."""
    before, now = yaml.safe_load(storage.read_bytes(folder.file("config.yaml"))), config.model_dump(mode="json")
    for section, values in now.items():
        for key, value in values.items():
            was = before.get(section, {}).get(key, value)  # a run of an earlier version lacks new settings
            if key not in free_to_change.get(section, ()) and was != value:
                raise UserError(
                    f"{section}.{key} was {was!r} in run {folder.name} and cannot become {value!r} when it is resumed; "
                    "remove it, or start a new run"
                )


def warn_if_temporary(terminal: Console, folder: RunFolder) -> None:
    """Warn if the run folder would be deleted with Ray's copy of the working directory."""
    if folder.is_temporary:
        terminal.print(
            f"run.storage {folder.storage} is inside Ray's copy of the working directory, which is deleted with the cluster: "
            "give an absolute folder or s3://bucket/prefix to keep the run",
            style="yellow",
            highlight=False,
            markup=False,
        )
