"""A finished pretraining run, opened again: its settings, its vocabulary, its model with the weights that came out."""

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from cmcgns import storage
from cmcgns.cli import validate
from cmcgns.config import Config
from cmcgns.data.tokenizer import SPECIAL_TOKENS, ReportTokenizer, load_tokenizer
from cmcgns.errors import UserError
from cmcgns.methods.base import Method, load_method
from cmcgns.models.backbones import ImageEncoder, build_image_backbone
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.plugins import is_plugin


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
    def method(self) -> Method[Any]:
        """The method that it was trained with."""
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
            left = model.load_state_dict(load_file(local / "heads.safetensors"), strict=False)
            if own_backbone:
                model.image_encoder.backbone.load_state_dict(load_file(local / "image_encoder" / "model.safetensors"))
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


RANDOM = "random"
PRETRAINED = "pretrained"
CLUSTERS = 128
"""Clusters for a method that has attention but clusters nothing itself."""


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
    def num_clusters(self) -> int:
        """Clusters K of its sentences: as many as pretraining used."""
        return self.config.banks[0].num_clusters if self.config.banks else CLUSTERS

    @property
    def origin(self) -> str:
        """Where its weights are from."""
        return "untrained" if self.kind == RANDOM else self.folder or self.run.export

    @property
    def has_reports(self) -> bool:
        """Whether it reads reports too."""
        return self.kind != "folder"

    def load_model(self) -> DualEncoder:
        """The whole model of a run, or the same before training, on the CPU, in evaluation mode."""
        if self.kind == "run":
            return self.run.load_model()
        torch.manual_seed(self.seed)
        return self.run.method.build_model(self.run.vocabulary_size).eval()

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
