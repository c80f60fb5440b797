"""Losses over what a sentence attends to on each film: film negatives, and InfoNCE of films and reports by parts.

The published sentence loss compares attended features of different sentences, and attention lets the asking sentence through:
it can be lowered without looking at the film. Here the sentence is the same on both sides, so that only the film differs.
Formulas: docs/methods.md.

n sentences of this rank, N of all ranks; B studies of this rank, G of all ranks; P patches, K centroids, D embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmcgns import distributed
from cmcgns.distributed import all_gather, all_reduce, ragged_all_gather, to_owners
from cmcgns.methods.cm_cgns.losses import MIN_NEGATIVES, SentenceLoss, nearest_two
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.methods.contrastive import same_text_mask
from cmcgns.models.retrieval import mean_over_sentences

CHUNK_WEIGHTS = 2**25
"""Attention weights (sentences x films x patches) of one chunk. A larger problem is computed in chunks that the backward pass
computes again, so that memory does not grow with the number of ranks."""


class Questions(NamedTuple):
    """Sentences that ask something of films."""

    query_nD: Tensor
    """Queries of the cross-modal attention."""
    z1_nD: Tensor
    """Normalised sentence embeddings, with which the attended features are compared."""


class Films(NamedTuple):
    """Keys and values of the cross-modal attention for the patches of films."""

    key_BPD: Tensor
    value_BPD: Tensor


def film_scores(questions: Questions, films: Films) -> Tensor:
    """Cosine of each sentence and what it attends to on each film, (n, B).

    Attended features are never built: with w the weights and v the values of a film, z1 . sum(w v) = sum(w (z1 . v)), and the
    squared length of sum(w v) is w' (v v') w. Both need only P numbers for each sentence and film, not D.
    """
    size, patches, _ = films.key_BPD.shape
    key_XD, value_XD = films.key_BPD.flatten(0, 1), films.value_BPD.flatten(0, 1)
    gram_BPP = films.value_BPD @ films.value_BPD.mT
    rows = max(CHUNK_WEIGHTS // max(size * patches, 1), 1)  # a rank may have no film in validation
    if len(questions.query_nD) <= rows:
        return _scores(*questions, key_XD, value_XD, gram_BPP)
    chunks = [
        # nothing random in it, and to save a GPU's random state is to wait for the GPU
        checkpoint(_scores, query_cD, z1_cD, key_XD, value_XD, gram_BPP, use_reentrant=False, preserve_rng_state=False)
        for query_cD, z1_cD in zip(questions.query_nD.split(rows), questions.z1_nD.split(rows), strict=True)
    ]
    return torch.cat(chunks)


def _scores(query_nD: Tensor, z1_nD: Tensor, key_XD: Tensor, value_XD: Tensor, gram_BPP: Tensor) -> Tensor:
    """``film_scores`` without chunks; X = B x P."""
    size, patches, _ = gram_BPP.shape
    weight_nBP = torch.sigmoid(query_nD @ key_XD.T * query_nD.shape[1] ** -0.5).unflatten(1, (size, patches))
    answer_nBP = (z1_nD @ value_XD.T).unflatten(1, (size, patches))
    weight_BnP = weight_nBP.transpose(0, 1)
    square_nB = ((weight_BnP @ gram_BPP) * weight_BnP).sum(-1).T
    dot_nB = (weight_nBP * answer_nBP).sum(-1)
    return dot_nB * square_nB.clamp(min=1e-24).rsqrt()


class AllScores(NamedTuple):
    """Cosine of sentences and what they attend to on films, for one side from this rank and the other from all."""

    of_own_sentences_nG: Tensor
    """This rank's sentences on the films of all ranks."""
    on_own_films_NB: Tensor
    """The sentences of all ranks on this rank's films."""


def all_film_scores(
    questions: Questions, films: Films, rank_sentences: tuple[int, ...], wire_dtype: torch.dtype = torch.float32
) -> AllScores:
    """``film_scores`` of the sentences of all ranks on the films of all ranks. Collective.

    Sentences travel and films stay: a report has some six sentences, a film 49 patches and more. Each rank answers the
    sentences of all ranks for its own films, and sends the scores back.
    """
    if distributed.world_size() == 1:
        return AllScores(*[film_scores(questions, films)] * 2)
    both_NE = ragged_all_gather(torch.cat(questions, dim=1), rank_sentences, with_grad=True, wire_dtype=wire_dtype)
    score_NB = film_scores(Questions(*both_NE.chunk(2, dim=1)), films)
    return AllScores(to_owners(score_NB, rank_sentences), score_NB)


def film_alignment_loss(
    score_nG: Tensor,
    z1_nD: Tensor,
    hash_n: Tensor,
    study_n: Tensor,
    rank_sentences: tuple[int, ...],
    centroids_KD: Tensor | None,
    config: Settings,
) -> SentenceLoss:
    """Cross-entropy of each sentence's own film against all ranks' films that do not show the same.

    A film is left out of a sentence's row if its report has a sentence of the same text. With centroids, ``film_guidance``
    decides about films whose report has a sentence of the same cluster: ``exclude`` leaves them out, ``soft`` gives a film the
    weight 1 - cos of the clusters, ``hard`` leaves them out and adds ``hard_negative_logit`` to films with a sentence of the
    second-nearest cluster. ``study_n``: index among this rank's studies. Sentences without a negative do not count.
    """
    films_G, ranks = score_nG.shape[1], len(rank_sentences)
    label_n = study_n + distributed.rank() * (films_G // ranks)
    cluster_n2 = torch.zeros_like(label_n).unsqueeze(1).expand(-1, 2)
    if centroids_KD is not None:
        cluster_n2 = nearest_two(z1_nD @ centroids_KD.to(score_nG.dtype).T).flat()
    own = torch.cat([torch.stack([hash_n, label_n], dim=1), cluster_n2], dim=1)
    hash_N, study_N, nearest_N, _ = ragged_all_gather(own, rank_sentences).unbind(1)
    out_nG = any_sentence(hash_n.unsqueeze(1) == hash_N, study_N, films_G)
    bias_nG, restored_n = torch.zeros_like(score_nG), torch.zeros_like(label_n, dtype=torch.bool)
    if centroids_KD is not None and config.film_guidance != "none":
        nearest_n, second_n = cluster_n2.unbind(1)
        if config.film_guidance == "soft":
            bias_nG = soft_weights(centroids_KD.to(score_nG.dtype), nearest_n, nearest_N, study_N, films_G).log()
        else:
            same_nG = any_sentence(nearest_n.unsqueeze(1) == nearest_N, study_N, films_G)
            left_n = films_G - (out_nG | same_nG).sum(1)  # without its own film, which has the same text
            restored_n = (left_n < MIN_NEGATIVES) & (same_nG & ~out_nG).any(1)
            out_nG = out_nG | (same_nG & ~restored_n.unsqueeze(1))
        if config.film_guidance == "hard":
            hard_nG = any_sentence(second_n.unsqueeze(1) == nearest_N, study_N, films_G)
            bias_nG = config.hard_negative_logit * hard_nG.to(score_nG.dtype)
    out_nG.scatter_(1, label_n.unsqueeze(1), False)
    bias_nG.scatter_(1, label_n.unsqueeze(1), 0.0)
    logits_nG = (score_nG / config.film_temperature + bias_nG).masked_fill(out_nG, -torch.inf)
    negatives_n = (logits_nG > -torch.inf).sum(1) - 1
    counts_n = negatives_n > 0
    counted = all_reduce(counts_n.sum()).clamp(min=1)
    nll_n = F.cross_entropy(logits_nG, label_n, reduction="none")
    return SentenceLoss(
        loss=ranks * torch.where(counts_n, nll_n, 0.0).sum() / counted,
        negatives_per_sentence=ranks * negatives_n.sum() / sum(rank_sentences),
        rows_restored=ranks * restored_n.sum().to(nll_n.dtype),
        mean_cosine=ranks * score_nG.detach().sum() / (sum(rank_sentences) * films_G),
    )


def parts_loss(
    scores: AllScores,
    study_n: Tensor,
    report_hash_B: Tensor,
    rank_sentences: tuple[int, ...],
    temperature: float,
) -> Tensor:
    """Symmetric InfoNCE of films and reports, where a report's score on a film is the mean of its sentences' scores.

    Each sentence gives evidence for or against a film; their mean is late interaction (FILIP, Yao et al. 2022) over sentences
    instead of tokens. Studies whose reports have the same text are no negatives of each other.
    """
    size, total = len(report_hash_B), scores.of_own_sentences_nG.shape[1]
    offset = distributed.rank() * size
    study_N = ragged_all_gather(study_n + offset, rank_sentences)
    report_to_film_BG = mean_over_sentences(scores.of_own_sentences_nG, study_n, size) / temperature
    film_to_report_BG = mean_over_sentences(scores.on_own_films_NB, study_N, total).T / temperature
    same_text_BG = same_text_mask(report_hash_B, all_gather(report_hash_B), offset)
    label_B = torch.arange(offset, offset + size, device=report_hash_B.device)
    losses = [
        F.cross_entropy(each_BG.masked_fill(same_text_BG, -torch.inf), label_B)
        for each_BG in (report_to_film_BG, film_to_report_BG)
    ]
    return torch.stack(losses).mean()


def any_sentence(true_nN: Tensor, study_N: Tensor, studies: int) -> Tensor:
    """True where any sentence of a study is, (n, G)."""
    count_nG = torch.zeros(len(true_nN), studies, dtype=torch.float32, device=true_nN.device)
    return count_nG.index_add_(1, study_N, true_nN.to(torch.float32)) > 0


def soft_weights(centroids_KD: Tensor, nearest_n: Tensor, nearest_N: Tensor, study_N: Tensor, studies: int) -> Tensor:
    """1 - cos of a sentence's centroid and the most similar one of a film's report, within [0, 1], (n, G)."""
    cosine_KK = (centroids_KD @ centroids_KD.T).fill_diagonal_(1.0)  # exactly: the same cluster has the weight 0
    cosine_nN = cosine_KK[nearest_n][:, nearest_N]
    least_nG = torch.full((len(nearest_n), studies), -1.0, dtype=cosine_nN.dtype, device=cosine_nN.device)
    closest_nG = least_nG.scatter_reduce(1, study_N.expand_as(cosine_nN), cosine_nN, "amax")
    return (1 - closest_nG).clamp(0.0, 1.0)
