"""Retrieval by a finished run on a split that it has not seen: recall both ways, as its own validation measures it."""

from typing import Any, Literal

import torch

from cmcgns.data.blocks import blocks
from cmcgns.data.dataset import stream_split
from cmcgns.data.order import VALIDATION_EPOCH
from cmcgns.evaluate.embed import STUDIES_AHEAD, open_split
from cmcgns.evaluate.exported import PretrainedRun, open_run
from cmcgns.evaluate.job_config import EmbedConfig
from cmcgns.models.vision_language import VisionLanguageModel
from cmcgns.train.board import start_board
from cmcgns.train.metrics import recall
from cmcgns.train.steps import Batcher

Split = Literal["train", "valid", "test"]


def retrieval(uri: str, split: Split) -> dict[str, Any]:
    """``recall`` over ``split`` of the corpus of the finished run in the folder ``uri``, by its export; runs on one CPU."""
    run = open_run("run", uri)
    return model_retrieval(run.load_model(), run, split)


def model_retrieval(model: VisionLanguageModel, run: PretrainedRun, split: Split) -> dict[str, Any]:
    """The same by ``model``, with the settings and the vocabulary of ``run``."""
    found = open_split(run, EmbedConfig(run=run.uri, split=split))
    board = start_board(len(found.studies), found.config.data.max_bad_fraction, {})
    stream = stream_split(
        found.source, found.studies, found.arrangement, run.tokenizer, found.config.data, board,
        taken_cpus=1.0, studies_ahead=STUDIES_AHEAD,
    )  # fmt: skip
    batch_of = Batcher(run.config, model.image_encoder.patches, run.tokenizer.pad_id, torch.device("cpu"))
    images, reports, hashes = [], [], []
    (rows,) = stream.split(VALIDATION_EPOCH, 0, run.config.train.microbatch_size, ranks=1)
    with torch.inference_mode():
        for block in blocks(rows, run.config.data.resize, run.config.train.microbatch_size):
            batch = batch_of(block, (int(block.sentence_counts.sum()),), training=False)
            outputs = model(batch)
            images.append(outputs.image_BD.float())
            reports.append(outputs.report_BD.float())
            hashes.append(batch.report_hash_B)
    return recall(torch.cat(images), torch.cat(reports), torch.cat(hashes))
