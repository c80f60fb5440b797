"""Encoders to evaluate: finished pretraining runs, untrained models and Hugging Face folders."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from cmcgns import storage
from cmcgns.config import Config, foreign_modules
from cmcgns.errors import UserError
from cmcgns.library.film_encoder import FilmEncoder, read_statistics
from cmcgns.library.runs import PretrainedRun, open_run, without_export
from cmcgns.models.backbones import ImageEncoder, build_image_backbone
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.run_folder import EXPORT_HASHES

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


def _unique_name(name: str, specs: list[EncoderSpec]) -> str:
    taken, number, unique = {spec.name for spec in specs}, 2, name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique
