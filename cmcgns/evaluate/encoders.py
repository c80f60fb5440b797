"""Encoders to be evaluated side by side: that of a run, the same before training, or one in a Hugging Face folder.

B films, P patches, C channels of the backbone, D embedding.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

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
    def origin(self) -> str:
        """Where its weights are from."""
        return "untrained" if self.kind == RANDOM else self.folder or self.run.export

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
        encoder = ImageEncoder(backbone, self.config.data.image_size)
        return FilmEncoder(encoder, None, mean_of_patches=True, statistics=read_statistics(self.folder)).eval()

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
                # a folder's JSON says how it takes films
                if name.endswith((".safetensors", ".bin", ".json")) and not name.startswith(("text_", "tokenizer")):
                    found.update(storage.read_bytes(storage.join(home, name)))
        return found.hexdigest()


class FilmEncoder(nn.Module):
    """An image encoder, and the way into the space of the reports where there is one.

    ``statistics``: mean and standard deviation of each channel, of pixels in [0, 1], that the encoder was trained with; without,
    it takes films in [-1, 1], as ours do.
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
            self.encoder.pool = nn.Identity()  # a pool of its own would be an untrained one

    @property
    def dim(self) -> int:
        """Channels C of the global feature."""
        return self.encoder.dim

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """``pooled_BC``, and ``image_BD`` of length 1 where reports can be compared with it."""
        features_BPC, pooled_BC = self.encoder(self._pixels(image_B1HW))
        if self.mean_of_patches:
            pooled_BC = features_BPC.mean(1)
        image_BD = None if self.projection is None else nn.functional.normalize(self.projection(pooled_BC), dim=-1)
        return pooled_BC, image_BD

    def levels(self, image_B1HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w), finest first: all stages of a ResNet, the last layer's patches of a ViT."""
        pixels_B3HW = self._pixels(image_B1HW)
        if self.encoder.is_convolutional:
            return list(self.encoder.backbone(pixel_values=pixels_B3HW, output_hidden_states=True).hidden_states)
        features_BPC = self.encoder(pixels_B3HW)[0]
        grid = int(features_BPC.shape[1] ** 0.5)
        return [features_BPC.mT.unflatten(2, (grid, grid)).contiguous()]

    def _pixels(self, image_B1HW: Tensor) -> Tensor:
        """Films in [-1, 1] as the encoder takes them, (B, 3, H, W)."""
        return ((image_B1HW + 1) / 2 - self.mean_3[:, None, None]) / self.spread_3[:, None, None]


def read_statistics(folder: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel in the preprocessor_config.json of a Hugging Face folder, if it says them."""
    path = Path(folder) / "preprocessor_config.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    if not written.get("do_normalize", True) or "image_mean" not in written:
        return None
    return [float(value) for value in written["image_mean"]], [float(value) for value in written["image_std"]]


def open_encoders(run_uri: str, beside: list[str], seed: int) -> list[EncoderSpec]:
    """The run's encoder first, then each one ``beside``: `random`, run folders, Hugging Face folders.

    Raises:
        UserError: a folder that holds neither a finished run nor a model.
    """
    run = open_run("evaluate.run", of_export(run_uri))
    specs = [EncoderSpec(PRETRAINED, run, "run")]
    for other in beside:
        if other == RANDOM:
            specs.append(EncoderSpec(_unused(RANDOM, specs), run, RANDOM, seed=seed))
        elif storage.exists(storage.join(of_export(other), "export/heads.safetensors")):
            theirs = open_run("evaluate.beside", of_export(other))
            specs.append(EncoderSpec(_unused(Path(theirs.uri).name, specs), theirs, "run"))
        elif Path(other).is_dir() and (Path(other) / "config.json").exists():
            with torch.device("meta"):  # what it lacks is told before anything begins
                build_image_backbone(other, run.config.data.image_size, 0.0)
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
