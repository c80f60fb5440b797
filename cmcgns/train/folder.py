"""What a pretraining run keeps in its folder: settings, vocabulary, checkpoints, bad rows."""

import json
import tempfile
from pathlib import Path
from typing import TypeVar

from cmcgns.command_line import to_yaml
from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import UserError
from cmcgns.models.tokenizer import ReportTokenizer, load_tokenizer
from cmcgns.run_folder import RunFolder, name_taken

AnyConfig = TypeVar("AnyConfig", bound=Config)
BAD_ROWS = "bad_rows.jsonl"
FREE_TO_CHANGE = {
    "data": {"uri", "window_size", "cpus_per_task", "studies_ahead", "max_bad_fraction"},
    "clustering": {"actors", "cpus_per_actor", "gpus_per_actor", "device"},
    "train": {
        "num_workers", "cpus_per_worker", "threads_per_worker", "use_gpu", "engine", "zero_stage", "microbatch_size",
        "activation_checkpointing", "placement", "overlap_comm",
        "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_failures",
    },
    "run": {"name", "storage", "resume"},
}  # fmt: skip
"""Settings that a resumed run may be given anew; all others decide what is learnt."""


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
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


def write_tokenizer(folder: RunFolder, tokenizer: ReportTokenizer) -> None:
    """Keep the vocabulary, which a resumed run must share."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        storage.upload_folder(Path(scratch), folder.file("tokenizer"))


def read_tokenizer(folder: RunFolder, config: Config) -> ReportTokenizer:
    """The vocabulary that the run began with."""
    with tempfile.TemporaryDirectory() as scratch:
        storage.download_folder(folder.file("tokenizer"), Path(scratch))
        return load_tokenizer(scratch, scratch, config.data.max_tokens, config.data.max_sentences)


def write_start(folder: RunFolder, config: Config, corpus_digest: str, tokenizer: ReportTokenizer) -> None:
    """Write down what a new run starts with; check that a resumed one still has its corpus."""
    if not folder.resumed:
        if storage.exists(folder.file("config.yaml")):  # another run of that name began while this one looked around
            raise UserError(name_taken(folder))
        write_tokenizer(folder, tokenizer)
        write_corpus(folder, corpus_digest)
        # last: where it lies, everything lies that a resumed run needs
        storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        return
    check_corpus(folder, config, corpus_digest)


def write_corpus(folder: RunFolder, corpus_digest: str) -> None:
    """Keep what ``check_corpus`` needs."""
    folder.write_json("corpus.json", {"digest": corpus_digest})


def check_corpus(folder: RunFolder, config: Config, corpus_digest: str, resume_key: str = "run.resume") -> None:
    """Refuse to go on with another corpus than the run, or the sweep, began with."""
    before = json.loads(storage.read_bytes(folder.file("corpus.json")))["digest"]
    if before != corpus_digest:
        raise UserError(
            f"{resume_key} {folder.name}: data.uri {config.data.uri} no longer holds the studies that it began with "
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
