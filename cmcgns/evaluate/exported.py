"""A finished pretraining run, opened again: its settings, its vocabulary, its model with the weights that came out."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from cmcgns.command_line import validate
from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import UserError
from cmcgns.models.tokenizer import SPECIAL_TOKENS, ReportTokenizer, load_tokenizer
from cmcgns.models.vision_language import VisionLanguageModel, build_model


@dataclass(frozen=True)
class PretrainedRun:
    """What a run folder says, but for the weights."""

    uri: str
    config: Config
    vocabulary: ReportTokenizer | None
    """None where its export has lost it."""

    @property
    def tokenizer(self) -> ReportTokenizer:
        """What its reports are read with.

        Raises:
            UserError: an export without tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.export} has no tokenizer folder, so reports cannot be read; tasks on films alone need none"
            )
        return self.vocabulary

    @property
    def vocabulary_size(self) -> int:
        """Entries of the vocabulary; the least that a model takes where there is none."""
        return self.vocabulary.vocabulary_size if self.vocabulary else len(SPECIAL_TOKENS)

    @property
    def export(self) -> str:
        """URI of the folder with encoders, heads and centroids."""
        return storage.join(self.uri, "export")

    def load_model(self) -> VisionLanguageModel:
        """The whole model on the CPU, in evaluation mode."""
        with tempfile.TemporaryDirectory(prefix="cmcgns-export-") as scratch:
            local = Path(scratch)
            storage.download_folder(self.export, local)
            encoders = {name: str(local / name) for name in ("image_encoder", "text_encoder")}
            built = self.config.model_copy(update={"model": self.config.model.model_copy(update=encoders)})
            model = build_model(built, self.vocabulary_size)
            left = model.load_state_dict(load_file(local / "heads.safetensors"), strict=False)
        missing = [name for name in left.missing_keys if ".backbone." not in name]
        if missing or left.unexpected_keys:
            raise UserError(
                f"{self.export} does not fit the run's config.yaml: {', '.join([*missing, *left.unexpected_keys][:3])}"
            )
        return model.eval()


def last_run(storage_uri: str) -> str:
    """URI of the last finished one of the runs under ``storage_uri`` that are named for their time.

    Raises:
        UserError: there is none.
    """
    root = storage.absolute("run.storage", storage_uri)
    try:
        names = sorted(name for name in storage.list_folders(root) if re.fullmatch(r"pretrain-\d{8}-\d{6}", name))
    except storage.MissingFileError:
        names = []
    for name in reversed(names):
        if storage.exists(storage.join(root, f"{name}/export/heads.safetensors")):
            return storage.join(root, name)
    raise UserError(
        f"evaluate.run is missing, and {root} holds no finished run that is named for its time; name the folder of a finished "
        "pretraining run, such as runs/NAME"
    )


def open_run(key: str, uri: str) -> PretrainedRun:
    """The run in the folder ``uri``, which the setting ``key`` names; one without an export is refused."""
    uri = storage.absolute(key, uri)
    if not storage.exists(storage.join(uri, "config.yaml")):
        raise UserError(f"{key} {uri} is no run folder: it holds no config.yaml; name <run.storage>/<run.name>")
    if not storage.exists(storage.join(uri, "export/heads.safetensors")):
        raise UserError(
            f"{key} {uri} has no export: the run has not finished; go on with --run.resume={Path(uri).name}"
        )
    settings: dict[str, Any] = yaml.safe_load(storage.read_bytes(storage.join(uri, "config.yaml")))
    config = validate(settings, Config)
    return PretrainedRun(uri, config, _vocabulary(storage.join(uri, "export/tokenizer"), config))


def _vocabulary(uri: str, config: Config) -> ReportTokenizer | None:
    if not storage.exists(storage.join(uri, "tokenizer.json")):
        return None
    with tempfile.TemporaryDirectory(prefix="cmcgns-tokenizer-") as scratch:
        storage.download_folder(uri, Path(scratch))
        return load_tokenizer(scratch, scratch, config.data.max_tokens, config.data.max_sentences)
