"""The sentence loss against a loop over every row and every hard-negative column."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.methods.cm_cgns.losses import SentenceLoss, sentence_alignment_loss
from cmcgns.methods.cm_cgns.settings import Settings

TEMPERATURE, OWN_LOGIT = 0.3, 2.0
EXACT = {"rtol": 0.0, "atol": 1e-10}


def objective(false_negatives: str, **more: float) -> Settings:
    return Settings.model_validate(
        {
            "false_negatives": false_negatives,
            "sentence_temperature": TEMPERATURE,
            "hard_negative_logit": OWN_LOGIT,
            "margin_weight": 0.7,  # large enough that the margin loss matters here
            **more,
        }
    )


def random_sentences(
    number: int, clusters: int, seed: int = 0, texts: int = 10**6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z1, z2, hashes and centroids; with few ``texts`` some sentences are the same."""
    source = torch.Generator().manual_seed(seed)
    z1_nD, z2_nD, centroids_KD = (
        F.normalize(torch.randn(rows, 8, generator=source, dtype=torch.float64), dim=1)
        for rows in (number, number, clusters)
    )
    return z1_nD, z2_nD, torch.randint(0, texts, (number,), generator=source), centroids_KD


def slow_loss(z1: Tensor, z2: Tensor, hashes: Tensor, centroids: Tensor, config: Settings) -> tuple[Tensor, int, float]:
    """Loss, rows restored and negatives per sentence, computed row by row."""
    number = len(z1)
    order = [(z1[i] @ centroids.T).argsort(descending=True).tolist() for i in range(number)]
    nearest, second = [row[0] for row in order], [row[1] for row in order]
    losses, penalties, restored, negatives = [], [], 0, 0
    for i in range(number):
        same_text = {j for j in range(number) if j != i and hashes[j] == hashes[i]}
        false = {j for j in range(number) if j != i and nearest[j] == nearest[i] and j not in same_text}
        gone = set(same_text)
        if config.false_negatives != "margin":
            if false and number - 1 - len(same_text | false) < 8:
                restored += 1
            else:
                gone |= false
        columns = [z1[i] @ z2[j] / TEMPERATURE for j in range(number) if j not in gone]
        negatives += len(columns) - 1
        for j in range(number):
            if config.false_negatives != "margin" and j != i and second[j] == nearest[i]:
                continue  # the hard negative of j is row i's own cluster
            columns.append(z1[i] @ centroids[second[j]] / TEMPERATURE + (OWN_LOGIT if i == j else 0.0))
        losses.append(torch.stack(columns).exp().sum().log() - z1[i] @ z2[i] / TEMPERATURE)
        if config.false_negatives != "exclude":
            for j in false:
                gap = z1[i] @ z2[j] - z1[i] @ z2[i]
                penalties.append(F.relu(gap + config.margin_alpha) + F.relu(-gap - config.margin_beta))
    margin = torch.stack(penalties).mean() if penalties else torch.zeros(())
    return torch.stack(losses).mean() + config.margin_weight * margin, restored, negatives / number


def fast_loss(z1: Tensor, z2: Tensor, hashes: Tensor, centroids: Tensor | None, config: Settings) -> SentenceLoss:
    return sentence_alignment_loss(z1, z2, hashes, (len(z1),), centroids, config)


@pytest.mark.parametrize("false_negatives", ["margin", "exclude", "both"])
@pytest.mark.parametrize(("number", "texts"), [(30, 10**6), (30, 12), (11, 4)])  # 11: rows must be restored
def test_the_vectorised_loss_and_its_gradients_are_those_of_a_loop(
    false_negatives: str, number: int, texts: int
) -> None:
    z1_nD, z2_nD, hash_n, centroids_KD = random_sentences(number, 4, texts=texts)
    config = objective(false_negatives)
    both = [[part.clone().requires_grad_() for part in (z1_nD, z2_nD)] for _ in range(2)]
    found = fast_loss(*both[0], hash_n, centroids_KD, config)
    expected, restored, negatives = slow_loss(*both[1], hash_n, centroids_KD, config)
    torch.testing.assert_close(found.loss, expected, **EXACT)
    assert int(found.rows_restored) == restored
    assert float(found.negatives_per_sentence) == pytest.approx(negatives, rel=1e-6)  # a float32 statistic
    found.loss.backward()
    expected.backward()
    for ours, theirs in zip(both[0], both[1], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)


def test_without_centroids_only_other_texts_are_negatives() -> None:
    z1_nD, z2_nD, hash_n, _ = random_sentences(20, 4, texts=6)
    found = fast_loss(z1_nD, z2_nD, hash_n, None, objective("both"))
    losses, negatives = [], 0
    for i in range(20):
        columns = [j for j in range(20) if j == i or hash_n[j] != hash_n[i]]
        losses.append(
            F.cross_entropy((z2_nD[columns] @ z1_nD[i] / TEMPERATURE)[None], torch.tensor([columns.index(i)]))
        )
        negatives += len(columns) - 1
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), **EXACT)
    assert float(found.negatives_per_sentence) == pytest.approx(negatives / 20)
    assert not float(found.rows_restored)
    assert float(found.mean_cosine) == pytest.approx(float((z1_nD @ z2_nD.T).mean()), abs=1e-12)


def test_a_batch_of_one_sentence_repeated_has_no_negatives_and_a_finite_gradient() -> None:
    z1_nD, z2_nD, _, centroids_KD = random_sentences(5, 4)
    z1_nD.requires_grad_()
    found = fast_loss(z1_nD, z2_nD, torch.zeros(5, dtype=torch.int64), None, objective("both"))
    assert not float(found.loss.detach())
    assert not float(found.negatives_per_sentence)
    guided = fast_loss(z1_nD, z2_nD, torch.zeros(5, dtype=torch.int64), centroids_KD, objective("both"))
    guided.loss.backward()
    assert z1_nD.grad is not None
    assert z1_nD.grad.isfinite().all()


def test_exclusion_drops_the_hard_negatives_that_are_a_rows_own_centroid() -> None:
    """Two centroids: every other sentence's hard negative is either the row's own second, or its own nearest."""
    z1_nD, z2_nD, hash_n, centroids_KD = random_sentences(40, 2)
    config = objective("exclude")
    found = fast_loss(z1_nD, z2_nD, hash_n, centroids_KD, config)
    side_n = (z1_nD @ centroids_KD.T).argmax(1)
    losses = []
    for i in range(40):
        others = side_n != side_n[i]
        columns = (z2_nD[others] @ z1_nD[i] / TEMPERATURE).exp().sum()
        positive = (z1_nD[i] @ z2_nD[i] / TEMPERATURE).exp()
        # sentences on my side have the other centroid as theirs; those on the other side have mine, and leave
        hard = (z1_nD[i] @ centroids_KD[1 - side_n[i]] / TEMPERATURE).exp()
        mine = int((~others).sum())
        losses.append((positive + columns + hard * (mine - 1 + math.exp(OWN_LOGIT))).log() - positive.log())
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), **EXACT)


def test_both_is_exclusion_plus_the_margin() -> None:
    sentences = random_sentences(30, 4, texts=12)
    whole = fast_loss(*sentences, objective("both")).loss
    excluded = fast_loss(*sentences, objective("exclude")).loss
    pulled = (
        fast_loss(*sentences, objective("margin")).loss
        - fast_loss(*sentences, objective("margin", margin_weight=0)).loss
    )
    torch.testing.assert_close(whole, excluded + pulled, **EXACT)


def test_no_false_negative_means_no_margin() -> None:
    z1_nD = torch.eye(4, dtype=torch.float64)
    with_margin, without = (
        fast_loss(z1_nD, z1_nD, torch.arange(4), torch.eye(4, dtype=torch.float64), objective(kind)).loss
        for kind in ("both", "exclude")
    )
    assert torch.equal(with_margin, without)


@pytest.mark.parametrize(("others", "restored"), [(8, 8), (7, 10)])
def test_a_row_keeps_its_false_negatives_only_where_fewer_than_8_others_would_stay(others: int, restored: int) -> None:
    """Three sentences of one cluster and 8 (or 7) of the other, whose rows have too few others in any case."""
    centroids_KD = torch.eye(2, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    lean_n2 = 0.1 * torch.randn(3 + others, 2, generator=source, dtype=torch.float64)
    z1_nD = F.normalize(centroids_KD[[0] * 3 + [1] * others] + lean_n2, dim=1)
    sentences = (z1_nD, z1_nD.flip(0), torch.arange(3 + others), centroids_KD)
    found = fast_loss(*sentences, objective("exclude"))
    expected, slowly_restored, _ = slow_loss(*sentences, objective("exclude"))
    assert int(found.rows_restored) == slowly_restored == restored
    torch.testing.assert_close(found.loss, expected, **EXACT)
