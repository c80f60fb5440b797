"""Finished pretraining runs and their exports: settings, vocabulary, weights; checked before anything of them is used."""

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml
from safetensors.torch import load_file

from cmcgns import storage
from cmcgns.cli import validate
from cmcgns.config import Config, foreign_modules
from cmcgns.data.tokenizer import SPECIAL_TOKENS, ReportTokenizer, load_tokenizer
from cmcgns.errors import UserError
from cmcgns.methods.base import Method, load_method
from cmcgns.models.backbones import check_finite
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.plugins import absolute_plugin, is_plugin
from cmcgns.run_folder import EXPORT_HASHES, is_automatic_name
from cmcgns.storage.integrity import damage, hash_uri

logger = logging.getLogger(__name__)
BACKBONES = ("image_encoder.backbone.", "text_encoder.backbone.")
HEADS = "heads.safetensors"
EXPORT_SETTINGS = "settings.json"
"""File of an export with the settings that loading it needs."""
WEIGHTS = (".safetensors", ".bin")
READING = ("resize", "image_size", "crop_borders", "max_tokens", "max_sentences")
"""Settings of `data` that change how a film or a report is read."""
LOAD = "cmcgns.load"
"""The key of messages to users of the library."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars that transformers shows while it loads weights."""
    from transformers.utils import logging as bars  # slow to import

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@dataclass(frozen=True)
class PretrainedRun:
    """A finished run without its weights: settings and vocabulary."""

    uri: str
    config: Config
    vocabulary: ReportTokenizer | None
    """None if the export has no tokenizer folder."""
    alone: bool = False
    """``uri`` is that of an export without its run."""

    @property
    def tokenizer(self) -> ReportTokenizer:
        """The tokenizer for reports.

        Raises:
            UserError: the export has no tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.export} has no tokenizer folder, so reports cannot be read; run only tasks that need no reports"
            )
        return self.vocabulary

    @property
    def vocabulary_size(self) -> int:
        """Entries of the vocabulary; without one, the minimum that a model accepts."""
        return self.vocabulary.vocabulary_size if self.vocabulary else len(SPECIAL_TOKENS)

    @property
    def method(self) -> Method[Any]:
        """The method with which it was trained."""
        return load_method(self.config)

    @property
    def export(self) -> str:
        """URI of the folder with encoders, heads and centroids."""
        return self.uri if self.alone else storage.join(self.uri, "export")

    def identity(self) -> str:
        """Hash of the weights, the vocabulary and how films and reports are read: equal where embeddings can be compared."""
        data = self.config.data
        read = {name: getattr(data, name) for name in READING}
        files = {name: value for name, value in self._hashes().items() if decides_embeddings(name)}
        return xxhash.xxh3_128_hexdigest(json.dumps([read, files], sort_keys=True).encode())

    def _hashes(self) -> dict[str, str]:
        """Hash of each file of the export, as its own list says, which ``check_export`` has compared."""
        listed = storage.join(self.export, EXPORT_HASHES)
        if storage.exists(listed):
            return dict(json.loads(storage.read_bytes(listed)))
        return {name: hash_uri(storage.join(self.export, name)) for name in storage.list_files(self.export)}

    def load_model(self) -> DualEncoder:
        """The whole model on the CPU, in evaluation mode."""
        with storage.scratch_folder() as local:
            storage.download_folder(self.export, local)
            encoders = {"text_encoder": str(local / "text_encoder")}
            own_backbone = is_plugin(self.config.model.image_encoder)
            if not own_backbone:
                encoders["image_encoder"] = str(local / "image_encoder")
            built = self.config.model_copy(update={"model": self.config.model.model_copy(update=encoders)})
            with without_bars():
                model = load_method(built).build_model(self.vocabulary_size)
            keys = model.load_state_dict(load_file(local / HEADS), strict=False)
            if own_backbone:
                own = model.image_encoder.backbone.load_state_dict(
                    load_file(local / "image_encoder" / "model.safetensors"), strict=False
                )
                keys.missing_keys.extend(own.missing_keys)
                keys.unexpected_keys.extend(own.unexpected_keys)
        # backbones that transformers loads are checked as they are loaded
        missing = [name for name in keys.missing_keys if not name.startswith((*BACKBONES, *model.training_only))]
        if missing or keys.unexpected_keys:
            raise UserError(
                f"{self.export} does not fit the run's config.yaml: missing or unexpected "
                f"{', '.join([*missing, *keys.unexpected_keys][:3])}; use the export and config.yaml of the same run"
            )
        check_finite(self.export, model.state_dict())
        return model.eval()


def decides_embeddings(name: str) -> bool:
    """Whether a file of an export holds weights or vocabulary; the model for plain transformers only repeats them."""
    repeats = "/" not in name and name.startswith(("model", "tokenizer"))
    return not repeats and (name.endswith(WEIGHTS) or "tokenizer" in name)


def last_run(storage_uri: str) -> str:
    """URI of the last finished run under ``storage_uri`` with an automatic name.

    Raises:
        UserError: there is no such run.
    """
    root = storage.absolute("run.storage", storage_uri)
    try:
        names = sorted(name for name in storage.list_folders(root) if is_automatic_name(name, "pretrain"))
    except storage.MissingFileError:
        names = []
    for name in reversed(names):
        if storage.exists(storage.join(root, f"{name}/export/{HEADS}")):
            return storage.join(root, name)
    raise UserError(
        f"evaluate.run is missing, and {root} has no finished run with an automatic name; give the folder of a finished "
        "pretraining run, such as runs/NAME"
    )


def open_run(key: str, uri: str, trusted: Collection[str] | None = None) -> PretrainedRun:
    """The run in the folder ``uri``, the value of setting ``key``.

    ``trusted``: modules that the run's settings may name and so execute, besides ours; None for a run of this very job.

    Raises:
        UserError: the folder contains no run, the run has no export, or its settings name a module that is not trusted.
    """
    uri = storage.absolute(key, uri)
    if not storage.exists(storage.join(uri, "config.yaml")):
        raise UserError(f"{key} {uri} is not a run folder: it has no config.yaml; give <run.storage>/<run.name>")
    if not storage.exists(storage.join(uri, f"export/{HEADS}")):
        raise UserError(
            f"{key} {uri} has no export: the run has not finished; resume it with --run.resume={Path(uri).name}"
        )
    config = _trusted_config(key, uri, storage.join(uri, "config.yaml"), trusted)
    check_export(storage.join(uri, "export"))
    return PretrainedRun(uri, config, _vocabulary(storage.join(uri, "export/tokenizer"), config))


def open_model(key: str, uri: str, trusted: Collection[str] = ()) -> PretrainedRun:
    """The run in the folder ``uri``, or the export of one, the value of ``key``; see ``open_run``.

    Raises:
        UserError: the folder contains neither, or the export has no settings.
    """
    uri = storage.absolute(key, uri).rstrip("/")
    if not storage.exists(storage.join(uri, HEADS)):
        if not storage.exists(uri):
            raise UserError(
                f"{key} {uri} does not exist; give the folder of a finished run, such as runs/NAME, or its export"
            )
        return open_run(key, uri, trusted)
    own, of_run = storage.join(uri, EXPORT_SETTINGS), storage.join(without_export(uri), "config.yaml")
    settings = own if storage.exists(own) else of_run
    if not storage.exists(settings):
        raise UserError(
            f"{key} {uri} has no {EXPORT_SETTINGS}: an earlier version wrote it. Load it in the folder of its run, or write it "
            "anew with: cmcgns export RUN OUT"
        )
    config = _trusted_config(key, uri, settings, trusted)
    check_export(uri)
    return PretrainedRun(uri, config, _vocabulary(storage.join(uri, "tokenizer"), config), alone=True)


def _trusted_config(key: str, uri: str, settings_uri: str, trusted: Collection[str] | None) -> Config:
    """The settings at ``settings_uri``; raises if they name a module that is not ``trusted``."""
    read = json.loads if settings_uri.endswith(".json") else yaml.safe_load
    settings: dict[str, Any] = read(storage.read_bytes(settings_uri))
    for setting, name in foreign_modules(settings).items():
        if trusted is not None and absolute_plugin(name) not in map(absolute_plugin, trusted):
            if key == LOAD:
                fix = f"trusted=[{name!r}]"
            elif "." in key:  # a setting of a job
                fix = f"{key.partition('.')[0]}.trusted=[{name}]"
            else:
                fix = f"--trusted={name}"
            raise UserError(
                f"{key} {uri}: its {Path(settings_uri).name} names the module {name} ({setting}), which would be executed here; "
                f"if you trust it, set {fix}"
            )
    return validate(settings, Config)


def portable_settings(config: Config) -> str:
    """The settings with which an export is loaded, as JSON: without what tells of the corpus and the machine.

    Folders and files of the user's own lose their path.
    """
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"run": True, "data": {"uri", "format"}})
    values["clustering"].pop("clusterer")
    for section, key in (
        ("model", "image_encoder"),
        ("model", "text_encoder"),
        ("model", "tokenizer"),
        ("method", "name"),
    ):
        if values[section][key].startswith("/"):
            values[section][key] = Path(values[section][key]).name
    return json.dumps(values, indent=1) + "\n"


def check_export(uri: str) -> None:
    """Raise ``UserError`` if a file of the export at ``uri`` is not what was written. Reads all of it."""
    if storage.exists(storage.join(uri, EXPORT_HASHES)):
        reason = damage(uri, EXPORT_HASHES)
    else:
        try:
            hashed = "format" in json.loads(storage.read_bytes(storage.join(uri, "preprocess.json")))
            reason = f"{EXPORT_HASHES} is missing" if hashed else None
        except (storage.MissingFileError, ValueError):
            reason = "preprocess.json is missing or damaged"
        if reason is None:
            logger.warning("%s was written by an earlier version, without hashes: it is not verified", uri)
    if reason is not None:
        raise UserError(f"export {uri} is damaged: {reason}; copy it again from where the run wrote it")


def _vocabulary(uri: str, config: Config) -> ReportTokenizer | None:
    if not storage.exists(storage.join(uri, "tokenizer.json")):
        return None
    with storage.scratch_folder() as scratch:
        storage.download_folder(uri, scratch)
        return load_tokenizer(str(scratch), str(scratch), config.data.max_tokens, config.data.max_sentences)


def without_export(uri: str) -> str:
    """``uri`` without a trailing `/export`: the run folder."""
    return uri.rstrip("/").removesuffix("/export")
