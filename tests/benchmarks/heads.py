"""Stage-1 heads and losses 1-3, forward and backward, against the bare matrix products that they are made of; and film negatives.

No encoders and no decoder: their place is taken by ready features. B studies, P patches, S sentences, D embedding,
K centroids.
"""

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.cm_cgns.films import Films, Questions, film_alignment_loss, film_scores
from cmcgns.methods.cm_cgns.method import CmCgns
from cmcgns.methods.cm_cgns.model import CmCgnsModel
from cmcgns.methods.cm_cgns.settings import Settings
from cmcgns.models.attention import AttentionPool, unit
from tests.benchmarks.measure import Line, interleaved, peak_in_child, ratio_of_medians, where

B, P, S, D, K = 64, 49, 6, 768, 128
ROUNDS = 15
MOST_RATIO, MOST_MIB, MOST_FILM_MIB = 1.5, 800, 1500


class ReadyFilms(nn.Module):
    """Stands for an image encoder: its features are ready, and receive gradients."""

    dim, grid, stride, is_convolutional = D, 7, 32, True

    def __init__(self) -> None:
        super().__init__()
        self.features_BPC = nn.Parameter(torch.randn(B, P, D))
        self.pooled_BC = nn.Parameter(torch.randn(B, D))

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        return self.features_BPC, self.pooled_BC


class ReadyReports(nn.Module):
    """Stands for a text encoder: sentences are ready, the report is pooled from them."""

    def __init__(self) -> None:
        super().__init__()
        self.sentences_BSD = nn.Parameter(torch.randn(B, S, D) / D**0.5)
        self.pool = AttentionPool(D)

    def forward(
        self, token_BT: Tensor, token_mask_BT: Tensor, owner_BT: Tensor, mask_BS: Tensor, *slices: object
    ) -> tuple[Tensor, Tensor]:
        return self.sentences_BSD, unit(self.pool(self.sentences_BSD, mask_BS))


def build_step() -> Callable[[], None]:
    """Forward and backward of heads and losses."""
    torch.manual_seed(0)
    model = CmCgnsModel(ReadyFilms(), ReadyReports(), D, 0.1, True, 0.5)  # type: ignore[arg-type]
    model.decoder = nn.Identity()
    method, batch = CmCgns(Config.model_construct(objective=Settings())), ready_batch()
    centroids_KD = F.normalize(torch.randn(K, D), dim=1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        method.losses(model(batch), batch, {"sentences": centroids_KD}, 1, 1).total.backward()

    return step


def ready_batch() -> ImageReportBatch:
    """A batch of which only sentences and hashes are looked at."""
    nothing = torch.zeros(B, 1)
    return ImageReportBatch(
        image_B1HW=nothing,
        token_BT=nothing.long(),
        token_mask_BT=nothing.bool(),
        sentence_of_token_BT=nothing.long(),
        sentence_mask_BS=torch.ones(B, S, dtype=torch.bool),
        sentence_row_n=torch.arange(B * S),
        sentence_hash_n=torch.arange(B * S),
        report_hash_B=torch.arange(B),
        draw_key_B=torch.arange(B),
        rank_sentences=(B * S,),
    )


class Product(NamedTuple):
    """A matrix product of the forward: ``times`` x (batch, rows, inner) @ (batch, inner, columns)."""

    what: str
    times: int
    batch: int
    rows: int
    inner: int
    columns: int
    constant_right: bool = False
    """The right side takes no gradient."""

    @property
    def products(self) -> int:
        """Products of the same size in forward and backward: one, and one for each side's gradient."""
        return self.times * (2 if self.constant_right else 3)

    @property
    def gflop(self) -> float:
        return self.products * 2 * self.batch * self.rows * self.inner * self.columns / 1e9


HEADS = 8
PRODUCTS = (
    Product("patch projection", 1, 1, B * P, D, D),
    Product("image projection", 1, 1, B, D, D),
    Product("patches to query, key, value", 3, 1, B * P, D, D),
    Product("sentences to query, key, value", 3, 1, B * S, D, D),
    Product("sentences on patches: weights", 1, B, S, D, P),
    Product("sentences on patches: sums", 1, B, S, P, D),
    Product("patches on sentences: weights", 1, B, P, D, S),
    Product("patches on sentences: sums", 1, B, P, S, D),
    Product("report pool: keys and values", 2, 1, B * (S + 1), D, D),
    Product("report pool: query and output", 2, 1, B, D, D),
    Product("report pool: weights", 1, B * HEADS, 1, D // HEADS, S + 1),
    Product("report pool: sums", 1, B * HEADS, 1, S + 1, D // HEADS),
    Product("predictor, first layer", 2, 1, B * P, D, D // 2),
    Product("predictor, second layer", 2, 1, B * P, D // 2, D),
    Product("films on reports and back", 2, 1, B, D, B),
    Product("sentences on attended", 1, 1, B * S, D, B * S),
    Product("sentences on centroids", 1, 1, B * S, D, K, constant_right=True),
)


FILM_PRODUCTS = (
    Product("sentences on all films: weights", 1, 1, B * S, D, B * P),
    Product("sentences on all films: sums", 1, B, B * S, P, D),
)


def build_film_step() -> Callable[[], None]:
    """Forward and backward of the film loss from ready queries, keys and values."""
    torch.manual_seed(0)
    own = Settings(local_negatives="films")
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((B * S, D), (B * S, D), (B, P, D), (B, P, D))]
    centroids_KD = F.normalize(torch.randn(K, D), dim=1)
    hash_n, study_n = torch.arange(B * S), torch.arange(B).repeat_interleave(S)

    def step() -> None:
        query_nD, z1_nD, key_BPD, value_BPD = leaves
        for leaf in leaves:
            leaf.grad = None
        z1_nD = unit(z1_nD)
        score_nB = film_scores(Questions(query_nD, z1_nD), Films(key_BPD, value_BPD))
        found = film_alignment_loss(score_nB, z1_nD, hash_n, study_n, (B * S,), centroids_KD, own)
        found.loss.backward()

    return step


def build_products(products: tuple[Product, ...] = PRODUCTS) -> Callable[[], None]:
    """The bare ``products``, forward and backward, nothing else."""
    operands = [(product, *(torch.randn(product.batch, *shape) for shape in _shapes(product))) for product in products]

    def run() -> None:
        for product, left, right, gradient in operands:
            for _ in range(product.times):
                torch.matmul(left, right)
                torch.matmul(gradient, right.mT)
                if not product.constant_right:
                    torch.matmul(left.mT, gradient)

    return run


def _shapes(product: Product) -> tuple[tuple[int, int], ...]:
    rows, inner, columns = product.rows, product.inner, product.columns
    return (rows, inner), (inner, columns), (rows, columns)


def lines() -> list[Line]:
    """The lines of the table."""
    sizes = f"B {B} P {P} S {S} D {D} K {K}"
    return [
        *_beside(f"heads and losses 1-3, {sizes}", build_step, PRODUCTS, MOST_MIB),
        *_beside(f"film negatives, {sizes}", build_film_step, FILM_PRODUCTS, MOST_FILM_MIB),
    ]


def _beside(
    what: str, build: Callable[[], Callable[[], None]], products: tuple[Product, ...], most_mib: int
) -> list[Line]:
    seconds = interleaved({"ours": build(), "products": build_products(products)}, ROUNDS)
    ratio = ratio_of_medians(seconds, "ours", "products")
    mib = peak_in_child("tests.benchmarks.heads", f"{build.__name__}()")
    return [
        Line(what, f"{median(seconds['ours']):.3f} s"),
        Line("  the bare matrix products", f"{median(seconds['products']):.3f} s"),
        Line("  ratio of medians", f"{ratio:.2f}", f"<= {MOST_RATIO}", ratio <= MOST_RATIO),
        Line("  peak memory", f"{mib:.0f} MiB", f"<= {most_mib}", mib <= most_mib),
    ]


def shapes() -> list[str]:
    """The products by shape."""
    return [
        f"{p.products:3} x ({p.batch} x {p.rows} x {p.inner}) @ ({p.batch} x {p.inner} x {p.columns})"
        f"  {p.gflop:6.2f} GFLOP  {p.what}"
        for p in (*PRODUCTS, *FILM_PRODUCTS)
    ]


if __name__ == "__main__":
    print(where())
    print(*shapes(), sep="\n")
    print(*lines(), sep="\n")
