"""Small models and random batches for tests, built from the same settings as real ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cmcgns.clustering.online_clustering import Centroids, LocalPool, OnlineClustering, Pool
from cmcgns.config import Config, method_settings
from cmcgns.data.batch import ImageReportBatch, PaddedReports, pad_reports
from cmcgns.methods.base import BankCentroids, Losses, load_method
from cmcgns.train.banks import Banks

VOCABULARY = 120


def small_config(**train: object) -> Config:
    """Settings of a model that runs in milliseconds; ``train`` and other ``section__key`` values on top."""
    settings: dict[str, dict[str, object]] = {
        "data": {"image_size": 32, "resize": 40, "max_tokens": 64, "phantom_size": 48, "phantom_studies": 100},
        "model": {"image_encoder": "vit-tiny", "text_encoder": "bert-tiny", "embed_dim": 32, "dropout": 0.0},
        "objective": {"num_clusters": 6},
        "clustering": {"bank_size": 1024, "actors": 2, "cpus_per_actor": 0.1, "start_cosine": 1.0, "refresh_every": 4},
        "train": {
            "microbatch_size": 4, "global_batch_size": 8, "stage1_steps": 10, "stage2_steps": 4, "warmup_steps": 0,
            "learning_rate": 1e-4,
        },
    }  # fmt: skip
    if "method__name" in train:
        own = method_settings(str(train["method__name"]))
        settings["method"] = {}
        settings["objective"] = {
            name: value for name, value in settings["objective"].items() if name in own.model_fields
        }
        settings["train"]["stage2_steps"] = 4 if own.stages >= 2 else 0
        settings["train"]["stage3_steps"] = 4 if own.stages == 3 else 0
    for key, value in train.items():
        section, _, name = key.rpartition("__")
        settings.setdefault(section or "train", {})[name] = value
    return Config.model_validate(settings)


def small_model(config: Config, seed: int = 0) -> Any:
    """The model of ``config`` with weights from ``seed``."""
    torch.manual_seed(seed)
    return load_method(config).build_model(VOCABULARY)


def losses_of(
    config: Config, outputs: Any, batch: ImageReportBatch, centroids_KD: torch.Tensor | None, stage: int = 1
) -> Losses:
    """The losses of the method, every bank of which has ``centroids_KD``, repeated to its width, with uneven members."""
    rows, counts = dict[str, torch.Tensor | None](), dict[str, torch.Tensor]()
    device = batch.report_hash_B.device
    for bank in config.banks:
        rows[bank.name] = None
        if centroids_KD is not None:
            times = bank.dim // centroids_KD.shape[1]
            rows[bank.name] = centroids_KD.repeat(1, times) / times**0.5
        counts[bank.name] = torch.arange(bank.num_clusters, device=device) ** 2.0
    return load_method(config).losses(outputs, batch, BankCentroids(rows, counts), stage, 1)


def banks_of(config: Config, *pools: Pool, device: str = "cpu") -> Banks:
    """The banks of the method, each over its own of the ``pools``; by default all over pools of this process."""
    method, clusterings = load_method(config), list[OnlineClustering]()
    own = pools or tuple(LocalPool(config.clustering) for _ in config.banks)
    for bank, pool in zip(config.banks, own, strict=False):  # a method without banks uses no pool
        centroids = Centroids(bank.num_clusters, bank.dim, device, config.clustering.momentum * bank.moves)
        clusterings.append(OnlineClustering(config.clustering, centroids, pool))
    return Banks(config.banks, clusterings, method.statistics)


def random_batch(config: Config, rows: slice, seed: int = 0, ranks: Sequence[slice] | None = None) -> ImageReportBatch:
    """Rows ``rows`` of an endless random batch; the other ranks hold ``ranks``."""
    studies = [_study(index, seed, config.data.image_size) for index in range(rows.start, rows.stop)]
    counts = np.array([len(study[3]) for study in studies])
    reports = pad_reports([s[1] for s in studies], [s[2] for s in studies], counts, 0)
    rank_sentences = tuple(
        sum(_sentences(index, seed) for index in range(each.start, each.stop)) for each in (ranks or [rows])
    )
    key_B = torch.arange(rows.start, rows.stop)
    views = load_method(config).views
    return ImageReportBatch(
        image_B1HW=torch.from_numpy(np.stack([s[0] for s in studies])).unsqueeze(1),
        **reports._asdict(),
        sentence_hash_n=torch.from_numpy(np.concatenate([s[3] for s in studies])),
        report_hash_B=torch.tensor([s[4] for s in studies]),
        draw_key_B=key_B,
        rank_sentences=rank_sentences,
        view_VB1HW=None if views is None else _views(studies, views[0]),
        continues_BT=_continues(reports) if getattr(config.objective, "whole_words", False) else None,
        label_BL=_labels(rows, config.objective.learned_labels()),
    )


def _continues(reports: PaddedReports) -> torch.Tensor:
    """A third of all tokens, but not the first of a sentence."""
    owner_BT = reports.sentence_of_token_BT
    inside_BT = torch.zeros_like(owner_BT, dtype=torch.bool)
    inside_BT[:, 1:] = (owner_BT[:, 1:] >= 0) & (owner_BT[:, 1:] == owner_BT[:, :-1])
    return inside_BT & (reports.token_BT % 3 == 0)


def _views(studies: "Sequence[tuple[np.ndarray, ...]]", number: int) -> torch.Tensor:
    """Films with different noise for each view."""
    films = [np.stack([np.roll(study[0], view, axis=0) for study in studies]) for view in range(number)]
    return torch.from_numpy(np.stack(films)).unsqueeze(2)


def _labels(rows: slice, names: tuple[str, ...]) -> torch.Tensor | None:
    """1, 0, -1 or NaN by study; the second study has no label."""
    if not names:
        return None
    place_BL = 3 * np.arange(rows.start, rows.stop)[:, None] + 5 * np.arange(len(names))
    return torch.from_numpy(np.array([1.0, 0.0, np.nan, 1.0, -1.0], np.float32)[place_BL % 5 * (place_BL > 0)])


def _sentences(index: int, seed: int) -> int:
    return int(np.random.default_rng([seed, index]).integers(1, 6))


def _study(index: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    random = np.random.default_rng([seed, index])
    sentences = int(random.integers(1, 6))
    lengths = random.integers(2, 7, sentences)
    owners = np.concatenate([[-1], np.repeat(np.arange(sentences), lengths), [-1]])
    tokens = np.concatenate([[2], random.integers(5, VOCABULARY, lengths.sum()), [3]])
    hashes = random.integers(0, 40, sentences)  # few texts: some sentences are the same
    return random.uniform(-1, 1, (size, size)).astype(np.float32), tokens, owners, hashes, int(random.integers(0, 30))
