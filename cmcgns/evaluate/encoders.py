"""Encoders to evaluate: finished pretraining runs, untrained models and Hugging Face folders."""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cmcgns import storage
from cmcgns.cli import validate
from cmcgns.config import Config, foreign_modules
from cmcgns.data.tokenizer import SPECIAL_TOKENS, ReportTokenizer, load_tokenizer
from cmcgns.errors import UserError
from cmcgns.methods.base import Method, load_method
from cmcgns.models.backbones import ImageEncoder, build_image_backbone, check_finite
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.plugins import absolute_plugin, is_plugin
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import damage

logger = logging.getLogger(__name__)
BACKBONES = ("image_encoder.backbone.", "text_encoder.backbone.")


@dataclass(frozen=True)
class PretrainedRun:
    """A finished run without its weights: settings and vocabulary."""

    uri: str
    config: Config
    vocabulary: ReportTokenizer | None
    """None if the export has no tokenizer folder."""

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
        return storage.join(self.uri, "export")

    def load_model(self) -> DualEncoder:
        """The whole model on the CPU, in evaluation mode."""
        with tempfile.TemporaryDirectory(prefix="cmcgns-export-") as scratch:
            local = Path(scratch)
            storage.download_folder(self.export, local)
            encoders = {"text_encoder": str(local / "text_encoder")}
            own_backbone = is_plugin(self.config.model.image_encoder)
            if not own_backbone:
                encoders["image_encoder"] = str(local / "image_encoder")
            built = self.config.model_copy(update={"model": self.config.model.model_copy(update=encoders)})
            model = load_method(built).build_model(self.vocabulary_size)
            keys = model.load_state_dict(load_file(local / "heads.safetensors"), strict=False)
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


def last_run(storage_uri: str) -> str:
    """URI of the last finished run under ``storage_uri`` with an automatic name.

    Raises:
        UserError: there is no such run.
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
    if not storage.exists(storage.join(uri, "export/heads.safetensors")):
        raise UserError(
            f"{key} {uri} has no export: the run has not finished; resume it with --run.resume={Path(uri).name}"
        )
    settings: dict[str, Any] = yaml.safe_load(storage.read_bytes(storage.join(uri, "config.yaml")))
    for setting, name in foreign_modules(settings).items():
        if trusted is not None and name not in map(absolute_plugin, trusted):
            raise UserError(
                f"{key} {uri}: its config.yaml names the module {name} ({setting}), which would be executed here; if you trust "
                f"it, set {key.split('.')[0]}.trusted=[{name}]"
            )
    config = validate(settings, Config)
    check_export(storage.join(uri, "export"))
    return PretrainedRun(uri, config, _vocabulary(storage.join(uri, "export/tokenizer"), config))


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
    with tempfile.TemporaryDirectory(prefix="cmcgns-tokenizer-") as scratch:
        storage.download_folder(uri, Path(scratch))
        return load_tokenizer(scratch, scratch, config.data.max_tokens, config.data.max_sentences)


RANDOM = "random"
PRETRAINED = "pretrained"
CLUSTERS = 128
"""Number of clusters for a method that has attention but no bank."""


@dataclass(frozen=True)
class EncoderSpec:
    """Specification of an encoder, without weights; small enough to send to Ray tasks."""

    name: str
    """Name in tables."""
    run: PretrainedRun
    """The run whose settings are used: its own run, or for ``folder`` the evaluated one."""
    kind: str
    """``run``, ``random`` (the run's model before training) or ``folder`` (a Hugging Face folder)."""
    folder: str = ""
    seed: int = 0

    @property
    def config(self) -> Config:
        """Settings of data and model."""
        return self.run.config

    @property
    def num_clusters(self) -> int:
        """Number of sentence clusters K, as in pretraining."""
        return self.config.banks[0].num_clusters if self.config.banks else CLUSTERS

    @property
    def origin(self) -> str:
        """Source of the weights."""
        return "untrained" if self.kind == RANDOM else self.folder or self.run.export

    @property
    def has_reports(self) -> bool:
        """True if it has a text encoder that has read reports."""
        return self.kind != "folder" and self.config.data.reports

    def load_model(self) -> DualEncoder:
        """The whole model of a run, trained or untrained, on the CPU, in evaluation mode."""
        if self.kind == "run":
            return self.run.load_model()
        torch.manual_seed(self.seed)
        return self.run.method.build_model(self.run.vocabulary_size).eval()

    def load(self) -> "FilmEncoder":
        """The film encoder, on the CPU, in evaluation mode."""
        if self.kind != "folder":
            model = self.load_model()
            return FilmEncoder(model.image_encoder, model.image_projection).eval()
        backbone = build_image_backbone(self.folder, self.config.data.image_size, 0.0)
        encoder = ImageEncoder(backbone, self.config.data.image_size)
        return FilmEncoder(encoder, None, mean_of_patches=True, statistics=read_statistics(self.folder)).eval()

    def digest(self) -> str:
        """Hash of the weights and the preprocessing of films; identifies stored features."""
        digest = hashlib.blake2b(digest_size=8)
        data = self.config.data
        digest.update(json.dumps([self.kind, data.resize, data.image_size]).encode())
        if self.kind == RANDOM:
            # weights are drawn in the method's order and those of the text encoder before the heads, so both affect the heads
            drawn = [self.seed, torch.__version__, self.run.vocabulary_size, data.max_tokens, self.config.method.name]
            sections = (self.config.model, self.config.objective)
            digest.update(f"{drawn} {' '.join(section.model_dump_json() for section in sections)}".encode())
        else:
            folder = self.run.export if self.kind == "run" else self.folder
            for name in storage.list_files(folder):
                # JSON files too: they contain the preprocessing
                if name.endswith((".safetensors", ".bin", ".json")) and not name.startswith(
                    ("text_", "tokenizer", EXPORT_HASHES)
                ):
                    digest.update(storage.read_bytes(storage.join(folder, name)))
        for name in foreign_modules(self.config.model_dump()).values():
            digest.update(Path(name).read_bytes() if name.endswith(".py") else name.encode())
        return digest.hexdigest()


class FilmEncoder(nn.Module):
    """An image encoder, with a projection to the space of the reports if there is one.

    ``statistics``: mean and standard deviation of each channel, for pixels in [0, 1], with which the encoder was trained; without
    them its input is in [-1, 1], like ours.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        projection: nn.Module | None,
        mean_of_patches: bool = False,
        statistics: tuple[list[float], list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        mean, spread = statistics or ([0.5] * 3, [0.5] * 3)
        self.mean_3, self.spread_3 = (nn.Buffer(torch.tensor(values), persistent=False) for values in (mean, spread))
        self.mean_of_patches = mean_of_patches and encoder.is_convolutional
        if self.mean_of_patches:
            self.encoder.pool = nn.Identity()  # an attention pool would be untrained

    @property
    def dim(self) -> int:
        """Channels C of the global feature."""
        return self.encoder.dim

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """``pooled_BC``, and with a projection ``image_BD`` of length 1, to compare with reports."""
        features_BPC, pooled_BC = self.encoder(self._pixels(image_B1HW))
        if self.mean_of_patches:
            pooled_BC = features_BPC.mean(1)
        image_BD = None if self.projection is None else nn.functional.normalize(self.projection(pooled_BC), dim=-1)
        return pooled_BC, image_BD

    def levels(self, image_B1HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first: all stages of a ResNet; else the patches of the last layer."""
        pixels_B3HW = self._pixels(image_B1HW)
        # every CNN of transformers returns its stages; a plugin's need not
        if self.encoder.is_convolutional and isinstance(self.encoder.backbone, PreTrainedModel):
            return list(self.encoder.backbone(pixel_values=pixels_B3HW, output_hidden_states=True).hidden_states)
        features_BPC = self.encoder(pixels_B3HW)[0]
        grid = int(features_BPC.shape[1] ** 0.5)
        return [features_BPC.mT.unflatten(2, (grid, grid)).contiguous()]

    def _pixels(self, image_B1HW: Tensor) -> Tensor:
        """Films in [-1, 1] normalised for the encoder, (B, 3, H, W)."""
        return ((image_B1HW + 1) / 2 - self.mean_3[:, None, None]) / self.spread_3[:, None, None]


def read_statistics(folder: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel from the preprocessor_config.json of a Hugging Face folder, None without."""
    path = Path(folder) / "preprocessor_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if not content.get("do_normalize", True) or "image_mean" not in content:
        return None
    return [float(value) for value in content["image_mean"]], [float(value) for value in content["image_std"]]


def open_encoders(run_uri: str, beside: list[str], seed: int, trusted: Collection[str] = ()) -> list[EncoderSpec]:
    """The run's encoder, then those of ``beside``: `random`, run folders, Hugging Face folders.

    Raises:
        UserError: a folder contains neither a finished run nor a model.
    """
    run = open_run("evaluate.run", without_export(run_uri), trusted)
    specs = [EncoderSpec(PRETRAINED, run, "run")]
    for other in beside:
        if other == RANDOM:
            specs.append(EncoderSpec(_unique_name(RANDOM, specs), run, RANDOM, seed=seed))
        elif storage.exists(storage.join(without_export(other), "export/heads.safetensors")):
            other_run = open_run("evaluate.beside", without_export(other), trusted)
            specs.append(EncoderSpec(_unique_name(Path(other_run.uri).name, specs), other_run, "run"))
        elif Path(other).is_dir() and (Path(other) / "config.json").exists():
            with torch.device("meta"):  # raises now if the model cannot be used
                build_image_backbone(other, run.config.data.image_size, 0.0)
            specs.append(EncoderSpec(_unique_name(Path(other).name, specs), run, "folder", str(Path(other).resolve())))
        else:
            raise UserError(
                f"evaluate.beside {other} is neither `random`, nor the folder of a finished run, nor a local Hugging Face "
                "folder with a config.json; give one of these"
            )
    return specs


def without_export(uri: str) -> str:
    """``uri`` without a trailing `/export`: the run folder."""
    return uri.rstrip("/").removesuffix("/export")


def _unique_name(name: str, specs: list[EncoderSpec]) -> str:
    taken, number, unique = {spec.name for spec in specs}, 2, name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique
