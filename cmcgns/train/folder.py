"""The run folder: a name that is new or resumed, the settings it was made with, and its last word."""

import json
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmcgns.command_line import to_yaml
from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import UserError, starting_with
from cmcgns.models.tokenizer import ReportTokenizer, load_tokenizer

BAD_ROWS = "bad_rows.jsonl"
FREE_TO_CHANGE = {
    "data": {"uri", "window_size", "cpus_per_task", "studies_ahead", "max_bad_fraction"},
    "clustering": {"actors", "cpus_per_actor", "gpus_per_actor", "device"},
    "train": {
        "num_workers", "cpus_per_worker", "threads_per_worker", "use_gpu", "engine", "zero_stage", "microbatch_size",
        "activation_checkpointing", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_failures",
    },
    "run": {"name", "storage", "resume"},
}  # fmt: skip
"""Settings that a resumed run may be given anew; all others decide what is learnt."""


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

    def write_tokenizer(self, tokenizer: ReportTokenizer) -> None:
        """Keep the vocabulary, which a resumed run must share."""
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save(Path(scratch))
            storage.upload_folder(Path(scratch), self.file("tokenizer"))

    def read_tokenizer(self, config: Config) -> ReportTokenizer:
        """The vocabulary that the run began with."""
        with tempfile.TemporaryDirectory() as scratch:
            for uri in storage.list_files(self.file("tokenizer")):
                name = uri.rstrip("/").rsplit("/", 1)[-1]
                (Path(scratch) / name).write_bytes(storage.read_bytes(self.file(f"tokenizer/{name}")))
            return load_tokenizer(scratch, scratch, config.data.max_tokens, config.data.max_sentences)


def with_absolute_paths(config: Config) -> Config:
    """``config`` with local folders made absolute: workers and data tasks start in other folders than the driver."""
    data, model = config.data, config.model
    uri = data.uri
    if not (storage.is_s3(uri) or "://" in uri or uri.split(":")[0] == "phantom"):
        uri = str(Path(uri).expanduser().absolute())
    given = {name: getattr(model, name) for name in ("image_encoder", "text_encoder", "tokenizer")}
    folders = {name: str(Path(value).absolute()) for name, value in given.items() if Path(value).is_dir()}
    return config.model_copy(
        update={"data": data.model_copy(update={"uri": uri}), "model": model.model_copy(update=folders)}
    )


def open_folder(config: Config) -> RunFolder:
    """The folder of ``config.run``; a name that is taken, or one that is to be resumed and is not there, is refused."""
    run = config.run
    # absolute here: workers start in another folder
    root = run.storage if storage.is_s3(run.storage) else str(Path(run.storage).expanduser().resolve())
    name = run.resume or run.name or time.strftime("pretrain-%Y%m%d-%H%M%S")
    folder = RunFolder(root.rstrip("/"), name, resumed=run.resume is not None)
    try:
        there = storage.exists(folder.file("config.yaml"))
        if storage.is_s3(root) and not there:
            # a missing bucket is no error to those who ask for one file in it
            with suppress(storage.MissingFileError):
                storage.list_folders(root)
    except UserError as error:
        raise UserError(f"run.storage {starting_with(run.storage, str(error))}") from None
    if folder.resumed and not there:
        raise UserError(f"run.resume {name}: there is no run of that name in {root}; look at run.storage")
    if not folder.resumed and there:
        raise UserError(_name_taken(folder))
    if folder.resumed:
        _refuse_changes(config, folder)
    return folder


def _name_taken(folder: RunFolder) -> str:
    name = folder.name
    return f"run.name {name} is taken in {folder.storage}; choose another, or go on with --run.resume={name}"


def _refuse_changes(config: Config, folder: RunFolder) -> None:
    if storage.exists(folder.file("result.json")):
        status = json.loads(storage.read_bytes(folder.file("result.json"))).get("status")
        if status == "finished":
            raise UserError(f"run.resume {folder.name}: that run has finished; its result is in {folder.uri}")
    before, now = yaml.safe_load(storage.read_bytes(folder.file("config.yaml"))), config.model_dump(mode="json")
    for section, values in now.items():
        for key, value in values.items():
            if key not in FREE_TO_CHANGE.get(section, ()) and before[section][key] != value:
                raise UserError(
                    f"{section}.{key} was {before[section][key]!r} in run {folder.name} and cannot become {value!r} "
                    "when it is resumed; leave it out, or start a new run"
                )


def write_start(folder: RunFolder, config: Config, corpus_digest: str, tokenizer: ReportTokenizer) -> None:
    """Write down what a new run starts with; check that a resumed one still has its corpus."""
    if not folder.resumed:
        if storage.exists(folder.file("config.yaml")):  # another run of that name began while this one looked around
            raise UserError(_name_taken(folder))
        folder.write_tokenizer(tokenizer)
        folder.write_json("corpus.json", {"digest": corpus_digest})
        # last: where it lies, everything lies that a resumed run needs
        storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        return
    before = json.loads(storage.read_bytes(folder.file("corpus.json")))["digest"]
    if before != corpus_digest:
        raise UserError(
            f"run.resume {folder.name}: data.uri {config.data.uri} no longer holds the studies that the run began with "
            f"({corpus_digest} instead of {before})"
        )


def latest_checkpoint(folder: RunFolder) -> str | None:
    """URI of the newest complete checkpoint in the folder."""
    names = [name for name in storage.list_folders(folder.uri) if name.startswith("checkpoint_")]
    found = [uri for name in sorted(names) if storage.exists(f"{(uri := folder.file(name))}/progress.json")]
    return found[-1] if found else None


def read_bad_rows(folder: str) -> dict[str, str]:
    """Reason by study out of the bad_rows.jsonl of a run's folder; nothing where there is none yet."""
    uri = storage.join(folder, BAD_ROWS)
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


def write_bad_rows(folder: str, bad_rows: dict[str, str]) -> None:
    """bad_rows.jsonl in a run's folder: every study that could not be used."""
    lines = [json.dumps({"source": source, "reason": reason}) + "\n" for source, reason in sorted(bad_rows.items())]
    storage.write_bytes(storage.join(folder, BAD_ROWS), "".join(lines).encode())
