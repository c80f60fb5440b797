"""Embeddings of studies in bf16 beside fp32."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmcgns.evaluate.embed import SentenceEmbedder
from cmcgns.methods.base import load_method
from tests.methods.test_ranks import CONFIGS, config_of
from tests.small import VOCABULARY, small_model
from tests.train.memory import MemoryBlocks

WITH_REPORTS = [name for name in CONFIGS if config_of(name).data.reports and load_method(config_of(name)).has_attention]


@pytest.mark.parametrize("name", WITH_REPORTS)
def test_every_method_with_attention_embeds_sentences_in_bf16_as_in_fp32(name: str) -> None:
    config = config_of(name)
    reader = SimpleNamespace(pad_id=0, continues_V=np.arange(VOCABULARY) % 3 == 0)
    block = next(MemoryBlocks(config, 8).whole())
    torch.manual_seed(0)
    model = small_model(config)
    whole, half = (
        SentenceEmbedder(model, reader, config, torch.device("cpu"), precision)(block)  # type: ignore[arg-type]
        for precision in ("fp32", "bf16")
    )
    assert np.array_equal(whole.study_n, half.study_n)
    for ours, theirs in ((half.attended_nD, whole.attended_nD), (half.sentence_nD, whole.sentence_nD)):
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < 0.05
        assert not np.array_equal(ours, theirs)  # it did run in bf16
