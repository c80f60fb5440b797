"""Encoders to be evaluated side by side: that of a run, the same before training, or one in a Hugging Face folder.

B films, P patches, C channels of the backbone, D embedding.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import UserError
from cmcgns.evaluate.exported import PretrainedRun, open_run
from cmcgns.models.image_encoder import ImageEncoder
from cmcgns.models.presets import build_image_backbone
from cmcgns.models.vision_language import VisionLanguageModel, build_model

RANDOM = "random"
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, unopened; small enough to travel into Ray tasks."""

    name: str
    """As tables show it."""
    run: PretrainedRun
    """The run whose settings it is evaluated with; its own where it has one."""
    kind: str
    """``run``, ``random`` (the run's model before training) or ``folder`` (a Hugging Face folder)."""
    folder: str = ""
    seed: int = 0

    @property
    def config(self) -> Config:
        """Settings of the films and the model."""
        return self.run.config

    @property
    def has_reports(self) -> bool:
        """Whether it reads reports too."""
        return self.kind != "folder"

    def load_model(self) -> VisionLanguageModel:
        """The whole model of a run, or the same before training, on the CPU, in evaluation mode."""
        if self.kind == "run":
            return self.run.load_model()
        torch.manual_seed(self.seed)
        return build_model(self.run.config, self.run.vocabulary_size).eval()

    def load(self) -> "FilmEncoder":
        """What sees films, on the CPU, in evaluation mode."""
        if self.kind != "folder":
            model = self.load_model()
            return FilmEncoder(model.image_encoder, model.image_projection).eval()
        backbone = build_image_backbone(self.folder, self.config.data.image_size, 0.0)
        return FilmEncoder(ImageEncoder(backbone, self.config.data.image_size), None, mean_of_patches=True).eval()

    def digest(self) -> str:
        """Hash of the weights and of how films are shown, by which features are known to be its own."""
        found = hashlib.blake2b(digest_size=8)
        data = self.config.data
        found.update(json.dumps([self.kind, data.resize, data.image_size]).encode())
        if self.kind == RANDOM:
            # the text encoder's weights are drawn before the heads': its size decides what these are
            drawn = [self.seed, torch.__version__, self.run.vocabulary_size, data.max_tokens]
            found.update(f"{drawn} {self.config.model.model_dump_json()}".encode())
        else:
            home = self.run.export if self.kind == "run" else self.folder
            for name in storage.list_files(home):
                if name.endswith((".safetensors", ".bin")) and not name.startswith("text_encoder/"):
                    found.update(storage.read_bytes(storage.join(home, name)))
        return found.hexdigest()


class FilmEncoder(nn.Module):
    """An image encoder, and the way into the space of the reports where there is one."""

    def __init__(self, encoder: ImageEncoder, projection: nn.Module | None, mean_of_patches: bool = False) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.mean_of_patches = mean_of_patches and encoder.is_convolutional
        if self.mean_of_patches:
            self.encoder.pool = nn.Identity()  # a pool of its own would be an untrained one

    @property
    def dim(self) -> int:
        """Channels C of the global feature."""
        return self.encoder.dim

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """``pooled_BC``, and ``image_BD`` of length 1 where reports can be compared with it."""
        features_BPC, pooled_BC = self.encoder(image_B1HW)
        if self.mean_of_patches:
            pooled_BC = features_BPC.mean(1)
        image_BD = None if self.projection is None else nn.functional.normalize(self.projection(pooled_BC), dim=-1)
        return pooled_BC, image_BD

    def levels(self, image_B1HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first: all stages of a ResNet, the last layer's patches of a ViT."""
        backbone = self.encoder.backbone
        pixels_B3HW = image_B1HW.to(next(self.parameters()).dtype).expand(-1, 3, -1, -1)
        if self.encoder.is_convolutional:
            return list(backbone(pixel_values=pixels_B3HW, output_hidden_states=True).hidden_states)
        features_BPC = self.encoder(image_B1HW)[0]
        grid = int(features_BPC.shape[1] ** 0.5)
        return [features_BPC.mT.unflatten(2, (grid, grid)).contiguous()]


def open_encoders(run_uri: str, beside: list[str], seed: int) -> list[EncoderSpec]:
    """The run's encoder first, then each one ``beside``: `random`, run folders, Hugging Face folders.

    Raises:
        UserError: a folder that holds neither a finished run nor a model.
    """
    run = open_run("evaluate.run", of_export(run_uri))
    specs = [EncoderSpec(PRETRAINED, run, "run")]
    for other in beside:
        if other == RANDOM:
            specs.append(EncoderSpec(RANDOM, run, RANDOM, seed=seed))
        elif storage.exists(storage.join(of_export(other), "export/heads.safetensors")):
            theirs = open_run("evaluate.beside", of_export(other))
            specs.append(EncoderSpec(_unused(Path(theirs.uri).name, specs), theirs, "run"))
        elif Path(other).is_dir() and (Path(other) / "config.json").exists():
            specs.append(EncoderSpec(_unused(Path(other).name, specs), run, "folder", str(Path(other).resolve())))
        else:
            raise UserError(
                f"evaluate.beside {other} is neither `random`, nor the folder of a finished run, nor a local Hugging Face "
                "folder with a config.json"
            )
    return specs


def of_export(uri: str) -> str:
    """The run folder of an export that lies in one; else ``uri`` itself."""
    return uri.rstrip("/").removesuffix("/export")


def _unused(name: str, specs: list[EncoderSpec]) -> str:
    taken, number, found = {spec.name for spec in specs}, 2, name
    while found in taken:
        found, number = f"{name} ({number})", number + 1
    return found


def frozen_state(module: nn.Module) -> dict[str, Any]:
    """A copy of every weight and buffer, to be compared after a frozen task."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
