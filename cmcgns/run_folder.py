"""The folder of a run: a name that is new or resumed, under a local folder or in a bucket."""

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cmcgns import storage
from cmcgns.config import RunConfig, Section
from cmcgns.errors import UserError, with_prefix


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run goes."""

    storage: str
    """Absolute folder or ``s3://`` URI that holds run folders."""
    name: str
    resumed: bool

    @property
    def uri(self) -> str:
        """The run's own folder."""
        return storage.join(self.storage, self.name)

    @property
    def is_passing(self) -> bool:
        """True in the copy of the working directory that Ray makes for a submitted job, and deletes when it likes."""
        return "working_dir_files" in Path(self.uri).parts

    def file(self, name: str) -> str:
        """URI of a file in the folder."""
        return storage.join(self.uri, name)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as indented JSON."""
        storage.write_bytes(self.file(name), (json.dumps(value, indent=1) + "\n").encode())


def open_folder(run: RunConfig, job: str, resume_key: str = "run.resume") -> RunFolder:
    """The folder of ``run``, see ``find_folder``; one that is to be resumed and has finished is refused."""
    folder = find_folder(run, job, resume_key)
    if folder.resumed and has_finished(folder):
        raise UserError(f"run.resume {folder.name}: that run has finished; its result is in {folder.uri}")
    return folder


def find_folder(run: RunConfig, job: str, resume_key: str = "run.resume") -> RunFolder:
    """The folder of ``run``, by default named for the ``job`` and the time; a name that is taken, or one that is to be
    resumed and is not there, is refused. ``resume_key`` is the setting that asks to resume, '' where a job cannot."""
    # absolute here: workers start in another folder
    root = run.storage if storage.is_s3(run.storage) else str(Path(run.storage).expanduser().resolve())
    name = run.resume or run.name or f"{job}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = RunFolder(root.rstrip("/"), name, resumed=run.resume is not None)
    try:
        there = storage.exists(folder.file("config.yaml"))
        if storage.is_s3(root) and not there:
            # a missing bucket is no error to those who ask for one file in it
            with suppress(storage.MissingFileError):
                storage.list_folders(root)
    except UserError as error:
        raise UserError(f"run.storage {with_prefix(run.storage, str(error))}") from None
    if folder.resumed and not there:
        raise UserError(f"{resume_key} {name}: there is no run of that name in {root}; look at run.storage")
    if not folder.resumed and there:
        raise UserError(name_taken(folder, resume_key))
    return folder


def name_taken(folder: RunFolder, resume_key: str = "run.resume") -> str:
    """What to say of a new run whose name is taken."""
    name = folder.name
    hint = f", or go on with --{resume_key}={name}" if resume_key else ""
    return f"run.name {name} is taken in {folder.storage}; choose another{hint}"


def has_finished(folder: RunFolder) -> bool:
    """Whether its last word is there, and says so."""
    uri = folder.file("result.json")
    return storage.exists(uri) and json.loads(storage.read_bytes(uri)).get("status") == "finished"


def refuse_changes(config: Section, folder: RunFolder, free_to_change: Mapping[str, Collection[str]]) -> None:
    """Refuse to resume under settings other than the run began with, but for those named."""
    before, now = yaml.safe_load(storage.read_bytes(folder.file("config.yaml"))), config.model_dump(mode="json")
    for section, values in now.items():
        for key, value in values.items():
            was = before.get(section, {}).get(key, value)  # a run of an earlier version lacks what is new
            if key not in free_to_change.get(section, ()) and was != value:
                raise UserError(
                    f"{section}.{key} was {was!r} in run {folder.name} and cannot become {value!r} when it is resumed; "
                    "leave it out, or start a new run"
                )


def warn_of_passing_folder(terminal: Console, folder: RunFolder) -> None:
    """Say so where the run would be deleted with Ray's copy of the working directory."""
    if folder.is_passing:
        terminal.print(
            f"[yellow]run.storage {folder.storage} lies in Ray's copy of the working directory, which goes with the "
            "cluster[/yellow]: give an absolute folder or s3://bucket/prefix to keep the run",
            highlight=False,
        )
