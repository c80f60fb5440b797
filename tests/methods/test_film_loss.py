"""The film loss and the loss by parts against loops over sentences and films, in chunks and on several ranks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.distributed import all_reduce
from cmcgns.methods.cm_cgns import films as film_module
from cmcgns.methods.cm_cgns.films import (
    AllScores,
    Films,
    Questions,
    all_film_scores,
    film_alignment_loss,
    film_scores,
    parts_loss,
)
from cmcgns.methods.cm_cgns.losses import SentenceLoss
from cmcgns.methods.cm_cgns.settings import Settings
from tests.ranks import run_on_ranks

STUDIES, PATCHES, DIM, TEMPERATURE, HARD = 12, 5, 8, 0.2, 1.5
SENTENCES = (3, 1, 2, 4, 2, 1, 3, 3, 2, 1, 2, 4)
"""Sentences of each study; on two and three ranks each rank has another number."""
REPORTS = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7, 8, 9, 2, 11])
"""Hashes of the reports: two pairs of studies have the same text."""
GUIDANCE = ("none", "exclude", "soft", "hard")


def settings(guidance: str) -> Settings:
    return Settings.model_validate(
        {"film_guidance": guidance, "film_temperature": TEMPERATURE, "hard_negative_logit": HARD}
    )


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def corpus(texts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, z1, keys, values, hashes, studies and centroids of all studies."""
    number = sum(SENTENCES)
    hash_N = torch.randint(0, texts, (number,), generator=torch.Generator().manual_seed(5))
    study_N = torch.repeat_interleave(torch.arange(STUDIES), torch.tensor(SENTENCES))
    rows = [drawn(number, DIM, seed=1), F.normalize(drawn(number, DIM, seed=2), dim=1)]
    patches = [drawn(STUDIES, PATCHES, DIM, seed=seed) for seed in (3, 4)]
    return *rows, *patches, hash_N, study_N, F.normalize(drawn(6, DIM, seed=6), dim=1)  # type: ignore[return-value]


def slow_score(query_D: Tensor, z1_D: Tensor, key_PD: Tensor, value_PD: Tensor) -> Tensor:
    attended_D = sum(torch.sigmoid(query_D @ key_PD[p] / DIM**0.5) * value_PD[p] for p in range(PATCHES))
    return z1_D @ F.normalize(attended_D, dim=0)


def slow_loss(query: Tensor, z1: Tensor, key: Tensor, value: Tensor, hashes, study, centroids, guidance):  # type: ignore[no-untyped-def]
    """Loss, rows restored and the films that each sentence is compared with, row by row."""
    reports = [[i for i in range(len(study)) if study[i] == j] for j in range(STUDIES)]
    order = [(z1[i] @ centroids.T).argsort(descending=True).tolist() for i in range(len(study))]
    losses, restored, compared = [], 0, []
    for i in range(len(study)):
        logits, own = {}, int(study[i])
        others = [j for j in range(STUDIES) if j != own and all(hashes[s] != hashes[i] for s in reports[j])]
        mates = [j for j in others if any(order[s][0] == order[i][0] for s in reports[j])]
        if guidance in ("exclude", "hard") and mates:
            if len(others) - len(mates) < 8:
                restored += 1
            else:
                others = [j for j in others if j not in mates]
        for j in [own, *others]:
            logits[j] = slow_score(query[i], z1[i], key[j], value[j]) / TEMPERATURE
            if j == own:
                continue
            if guidance == "soft":
                closest = max(centroids[order[i][0]] @ centroids[order[s][0]] for s in reports[j])
                logits[j] = logits[j] + (1 - closest).clamp(0, 1).log() if j not in mates else -torch.inf
            if guidance == "hard" and any(order[s][0] == order[i][1] for s in reports[j]):
                logits[j] = logits[j] + HARD
        logits = {j: logit for j, logit in logits.items() if torch.as_tensor(logit).item() > -torch.inf}
        compared.append(set(logits) - {own})
        if len(logits) > 1:
            losses.append(torch.stack(list(logits.values())).logsumexp(0) - logits[own])
    return torch.stack(losses).mean(), restored, compared


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("texts", [1000, 6, 1])
def test_the_loss_its_masks_and_gradients_are_those_of_a_loop(guidance: str, texts: int) -> None:
    *tensors, hash_N, study_N, centroids_KD = corpus(texts)
    if texts == 1:  # every film shows the same: nothing is compared
        found = fast_loss(tensors, hash_N, study_N, centroids_KD, guidance)
        assert (float(found.loss), float(found.negatives_per_sentence)) == (0.0, 0.0)
        return
    slow, fast = ([each.clone().requires_grad_() for each in tensors] for _ in range(2))
    expected, restored, compared = slow_loss(*slow, hash_N, study_N, centroids_KD, guidance)
    found = fast_loss(fast, hash_N, study_N, centroids_KD, guidance)
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert float(found.rows_restored) == restored
    assert float(found.negatives_per_sentence) == pytest.approx(sum(map(len, compared)) / len(study_N), rel=1e-6)
    expected.backward()
    found.loss.backward()
    for one, other in zip(slow, fast, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-10)


def fast_loss(tensors, hash_N, study_N, centroids_KD, guidance) -> SentenceLoss:  # type: ignore[no-untyped-def]
    query, z1, key, value = tensors
    score_nG = film_scores(Questions(query, z1), Films(key, value))
    return film_alignment_loss(score_nG, z1, hash_N, study_N, (len(study_N),), centroids_KD, settings(guidance))


def test_exclude_restores_rows_that_would_keep_too_few_films() -> None:
    *tensors, hash_N, study_N, centroids_KD = corpus(1000)
    assert slow_loss(*tensors, hash_N, study_N, centroids_KD, "exclude")[1] > 0
    few = slow_loss(*tensors, hash_N, study_N, centroids_KD, "exclude")[2]
    assert {len(each) for each in few} != {STUDIES - 1}


def test_without_centroids_guidance_changes_nothing() -> None:
    *tensors, hash_N, study_N, _ = corpus(6)
    found = {guidance: float(fast_loss(tensors, hash_N, study_N, None, guidance).loss) for guidance in GUIDANCE}
    assert len(set(found.values())) == 1


def test_chunks_give_the_scores_and_gradients_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, _, _, _ = corpus(1000)
    whole, parts = ([each.clone().requires_grad_() for each in tensors] for _ in range(2))
    expected_nB = film_scores(Questions(*whole[:2]), Films(*whole[2:]))
    monkeypatch.setattr(film_module, "CHUNK_WEIGHTS", 7 * STUDIES * PATCHES)
    with torch.inference_mode():  # as evaluation does
        assert torch.allclose(
            film_scores(Questions(*tensors[:2]), Films(*tensors[2:])), expected_nB, rtol=0, atol=1e-12
        )
    found_nB = film_scores(Questions(*parts[:2]), Films(*parts[2:]))
    torch.testing.assert_close(found_nB, expected_nB, rtol=0, atol=1e-12)
    for scores in (expected_nB, found_nB):
        (scores * drawn(*scores.shape, seed=9)).sum().backward()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-10)


def test_a_film_whose_values_are_zero_has_no_score_and_no_gradient_that_is_not_finite() -> None:
    *tensors, _, _, _ = corpus(1000)
    query, z1, key, value = (each.clone().requires_grad_() for each in tensors)
    scores_nB = film_scores(Questions(query, z1), Films(key, value * 0))
    assert not scores_nB.any()
    scores_nB.sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in (query, z1, key, value))  # type: ignore[union-attr]


@pytest.mark.parametrize("reports", [REPORTS, torch.arange(STUDIES), torch.zeros(STUDIES, dtype=torch.int64)])
def test_the_loss_by_parts_is_that_of_a_loop_over_reports_and_films(reports: Tensor) -> None:
    *tensors, _, study_N, _ = corpus(6)
    slow, fast = ([each.clone().requires_grad_() for each in tensors] for _ in range(2))
    query, z1, key, value = slow
    members = [[i for i in range(len(study_N)) if study_N[i] == r] for r in range(STUDIES)]
    score = [
        [
            torch.stack([slow_score(query[i], z1[i], key[f], value[f]) for i in members[r]]).mean()
            for f in range(STUDIES)
        ]
        for r in range(STUDIES)
    ]
    losses = []
    for own in range(STUDIES):
        others = [j for j in range(STUDIES) if j != own and reports[j] != reports[own]]
        for row in ([score[own][j] for j in (own, *others)], [score[j][own] for j in (own, *others)]):
            losses.append(F.cross_entropy(torch.stack(row) / TEMPERATURE, torch.tensor(0)))
    expected = torch.stack(losses).mean()
    scores = film_scores(Questions(*fast[:2]), Films(*fast[2:]))
    found = parts_loss(AllScores(scores, scores), study_N, reports, (len(study_N),), TEMPERATURE)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    expected.backward()
    found.backward()
    for one, other in zip(slow, fast, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-10)


def on_ranks() -> dict[str, tuple[float, list[float], list[Tensor], Tensor]]:
    """Loss, statistics, gradients of all studies and scores of all sentences, by guidance."""
    *tensors, hash_N, study_N, centroids_KD = corpus(6)
    rank, ranks = distributed.rank(), distributed.world_size()
    share = STUDIES // ranks
    own = slice(rank * share, (rank + 1) * share)
    rows = (study_N >= own.start) & (study_N < own.stop)
    counts = tuple(sum(SENTENCES[r * share : (r + 1) * share]) for r in range(ranks))
    results = {}
    for guidance in GUIDANCE:
        leaves = [each.clone().requires_grad_() for each in tensors]
        questions, films = Questions(leaves[0][rows], leaves[1][rows]), Films(leaves[2][own], leaves[3][own])
        scores, study_n = all_film_scores(questions, films, counts), study_N[rows] - own.start
        found = film_alignment_loss(
            scores.of_own_sentences_nG, questions.z1_nD, hash_N[rows], study_n, counts, centroids_KD, settings(guidance)
        )
        by_parts = parts_loss(scores, study_n, REPORTS[own], counts, TEMPERATURE)
        total = found.loss + by_parts
        (total / ranks).backward()
        gradients = [all_reduce(leaf.grad) for leaf in leaves]  # type: ignore[arg-type]
        statistics = [float(all_reduce(each.double()) / ranks) for each in found[1:]]
        all_scores_NG = distributed.ragged_all_gather(scores.of_own_sentences_nG.detach(), counts)
        results[guidance] = (float(all_reduce(total.detach()) / ranks), statistics, gradients, all_scores_NG)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_give_the_loss_and_gradients_of_one(ranks: int) -> None:
    expected = on_ranks()
    for found in run_on_ranks(ranks, on_ranks):
        for guidance, (loss, statistics, gradients, scores) in expected.items():
            assert found[guidance][0] == pytest.approx(loss, abs=1e-12)
            assert found[guidance][1] == pytest.approx(statistics, rel=1e-6)
            torch.testing.assert_close(found[guidance][3], scores, rtol=0, atol=1e-12)
            for one, other in zip(gradients, found[guidance][2], strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=1e-10)
