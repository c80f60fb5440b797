"""Sentences as a trained model sees them: what it finds on the film where a sentence looks (z2), and the words' own vector.

n sentences of a block of studies, S sentences of one study (padded), D embedding.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cmcgns.config import Config
from cmcgns.data.blocks import Block
from cmcgns.models.cross_attention import unit
from cmcgns.models.tokenizer import ReportTokenizer
from cmcgns.models.vision_language import VisionLanguageModel
from cmcgns.train.steps import Batcher

FloatArray = npt.NDArray[np.float32]


class SentenceVectors(NamedTuple):
    """All sentences of a block, study by study; rows of length 1."""

    study_n: npt.NDArray[np.int64]
    """Place of each sentence's study in the block."""
    number_n: npt.NDArray[np.int64]
    """Place of the sentence in its report."""
    attended_nD: FloatArray
    """What the sentence attends to on its study's film: the features that pretraining clusters."""
    sentence_nD: FloatArray
    """The mean of the sentence's tokens."""


class SentenceEmbedder:
    """A model that turns blocks of studies into ``SentenceVectors``; films are cropped at the middle, nothing is drawn."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: ReportTokenizer, config: Config, device: torch.device
    ) -> None:
        self.model = model.to(device).eval()
        self.batcher = Batcher(config, model.image_encoder.patches, tokenizer.pad_id, device)

    @torch.inference_mode()
    def __call__(self, block: Block) -> SentenceVectors:
        counts_B = block.sentence_counts
        batch = self.batcher(block, (int(counts_B.sum()),), training=False)
        outputs = self.model(batch)
        rows = lambda values_BSD: unit(values_BSD.flatten(0, 1)[batch.sentence_row_n].float()).cpu().numpy()
        return SentenceVectors(
            np.repeat(np.arange(len(block)), counts_B),
            np.concatenate([np.arange(count) for count in counts_B]),
            rows(outputs.image_to_text_BSD),
            rows(outputs.sentences_BSD),
        )


def sentence_table(vectors: SentenceVectors, study_ids: list[str], texts: pa.Array) -> pa.Table:
    """Columns id (``study/number``), study_id, text, vector (attended features) and sentence_vector, one row a sentence;
    ``study_ids`` are those of the block, ``texts`` its sentences' words."""
    ids = [study_ids[place] for place in vectors.study_n]
    dim = vectors.attended_nD.shape[1]
    column = lambda rows_nD: pa.FixedSizeListArray.from_arrays(pa.array(rows_nD.ravel()), dim)
    return pa.table(
        {
            "id": [f"{study}/{number}" for study, number in zip(ids, vectors.number_n, strict=True)],
            "study_id": ids,
            "text": texts,
            "vector": column(vectors.attended_nD),
            "sentence_vector": column(vectors.sentence_nD),
        }
    )
