"""The model's parts against the numbers of the published method."""

import pytest
import torch
from torch import Tensor, nn

from cmcgns.methods.cm_cgns.model import CrossModalAttention
from cmcgns.models.attention import AttentionPool
from tests.golden import EXACT, golden, padded_sentences


@pytest.fixture(name="numbers")
def fixture_numbers() -> dict[str, Tensor]:
    return golden()


def weights(numbers: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """A state dict: our layer names from the published ones."""
    return {
        f"{ours}.{part}": numbers[f"{theirs}.{part}"] for ours, theirs in names.items() for part in ("weight", "bias")
    }


def published_attention(numbers: dict[str, Tensor]) -> CrossModalAttention:
    attention = CrossModalAttention(32).double()
    sides = {"image": 1, "text": 2}
    roles = ("query", "key", "value")
    attention.load_state_dict(weights(numbers, {f"{s}.{r}": f"attn.{r}{n}" for s, n in sides.items() for r in roles}))
    return attention


def test_cross_attention_gives_the_published_numbers_both_ways(numbers: dict[str, Tensor]) -> None:
    sentences_BSD, mask_BS = padded_sentences(numbers)
    found = published_attention(numbers)(numbers["in.patches"], sentences_BSD, mask_BS)
    torch.testing.assert_close(found.image_to_text_BSD[mask_BS], numbers["out.image_to_text"], **EXACT)
    torch.testing.assert_close(found.text_to_image_BPD, numbers["out.text_to_image"], **EXACT)
    assert found.hidden_B1D is None


def test_a_hidden_patch_asks_the_text_what_any_patch_of_that_feature_would_ask(numbers: dict[str, Tensor]) -> None:
    sentences_BSD, mask_BS = padded_sentences(numbers)
    attention, patches_BPD = published_attention(numbers), numbers["in.patches"]
    token_D = patches_BPD[0, 3]
    found = attention(patches_BPD, sentences_BSD, mask_BS, token_D)
    assert found.hidden_B1D is not None
    torch.testing.assert_close(found.hidden_B1D[0, 0], found.text_to_image_BPD[0, 3], **EXACT)


def test_the_report_pool_gives_the_published_report_embeddings(numbers: dict[str, Tensor]) -> None:
    sentences_BSD, mask_BS = padded_sentences(numbers)
    pool = AttentionPool(32, heads=8).double()
    pool.load_state_dict(weights(numbers, {name: f"pool.{name}" for name in ("q_proj", "k_proj", "v_proj", "c_proj")}))
    torch.testing.assert_close(pool(sentences_BSD, mask_BS), numbers["out.report_pooled"], **EXACT)


def test_the_predictor_and_patch_loss_give_the_published_simsiam(numbers: dict[str, Tensor]) -> None:
    from cmcgns.methods.cm_cgns.losses import patch_alignment_loss

    predictor = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)).double()
    predictor.load_state_dict(weights(numbers, {"0": "predictor.0", "2": "predictor.2"}))
    patches_BPD, attended_BPD = numbers["in.patches"], numbers["out.text_to_image"]
    loss = patch_alignment_loss(patches_BPD, attended_BPD, predictor(patches_BPD), predictor(attended_BPD))
    torch.testing.assert_close(loss, numbers["out.local_image_simsiam"], **EXACT)
