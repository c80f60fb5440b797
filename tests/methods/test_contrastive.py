"""The global loss against a loop over films and reports."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.methods.contrastive import contrastive_loss, directed_losses
from tests.golden import golden

EXACT = {"rtol": 0.0, "atol": 1e-10}
GOLDEN = {"rtol": 0.0, "atol": 1e-12}


def random_pairs(number: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    image_BD, report_BD = (
        F.normalize(torch.randn(number, 8, generator=source, dtype=torch.float64), dim=1) for _ in range(2)
    )
    return image_BD, report_BD


def slow_loss(image: Tensor, report: Tensor, hashes: Tensor, scale: float) -> Tensor:
    number, losses = len(image), []
    for i in range(number):
        others = [j for j in range(number) if j == i or hashes[j] != hashes[i]]
        for query, items in ((image[i], report), (report[i], image)):
            logits = torch.stack([scale * (query @ items[j]) for j in others])
            losses.append(-(scale * (query @ items[i]) - logits.exp().sum().log()))
    return torch.stack(losses).mean()


def test_the_global_loss_and_its_gradients_are_those_of_a_loop() -> None:
    hash_B = torch.tensor([5, 1, 5, 2, 3, 1, 5, 4])  # three times 5, twice 1
    both = [[part.requires_grad_() for part in random_pairs(8)] for _ in range(2)]
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    fast, slow = contrastive_loss(*both[0], hash_B, scale), slow_loss(*both[1], hash_B, 7.0)
    torch.testing.assert_close(fast, slow, **EXACT)
    fast.backward()
    slow.backward()
    for ours, theirs in zip(both[0], both[1], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    step = 1e-5
    slope = (slow_loss(*both[1], hash_B, 7 + step) - slow_loss(*both[1], hash_B, 7 - step)) / (2 * step)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad[0], slope.detach(), rtol=0, atol=1e-8)  # error of the difference quotient


def test_films_of_one_text_do_not_push_each_other_away() -> None:
    image_BD, report_BD = random_pairs(4)
    report_BD.requires_grad_()
    hash_B = torch.tensor([1, 1, 2, 3])
    # only the film of study 0: its gradient to the other reports
    image_BD[1:] = 0.0
    contrastive_loss(image_BD, report_BD, hash_B, torch.full((1,), 5.0, dtype=torch.float64)).backward()
    assert report_BD.grad is not None
    assert not report_BD.grad[1].any()
    assert report_BD.grad[2].any()


def test_studies_that_all_share_one_text_cost_nothing() -> None:
    image_BD, report_BD = random_pairs(4)
    loss = contrastive_loss(image_BD, report_BD, torch.zeros(4, dtype=torch.int64), torch.ones(1, dtype=torch.float64))
    assert float(loss) == 0.0


def test_equal_weights_give_the_plain_mean_bit_for_bit() -> None:
    hash_B, scale = torch.tensor([5, 1, 5, 2, 3, 1, 5, 4]), torch.tensor([7.0], requires_grad=True)
    both = [[part.float().requires_grad_() for part in random_pairs(8)] for _ in range(2)]
    loss = contrastive_loss(*both[0], hash_B, scale)
    films, reports = directed_losses(*both[1], hash_B, scale)
    plain = (films + reports) / 2  # as it was before there were weights
    assert torch.equal(loss, plain)
    ours = torch.autograd.grad(loss, [*both[0], scale])
    assert all(map(torch.equal, ours, torch.autograd.grad(plain, [*both[1], scale])))


def test_without_hashes_equal_texts_are_negatives_like_all_others() -> None:
    image_BD, report_BD = random_pairs(4)
    scale = torch.full((1,), 5.0, dtype=torch.float64)
    every = contrastive_loss(image_BD, report_BD, None, scale)
    assert torch.equal(every, contrastive_loss(image_BD, report_BD, torch.arange(4), scale))
    assert every > contrastive_loss(image_BD, report_BD, torch.tensor([1, 1, 2, 3]), scale)


def weighted(film_weight: float, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """The loss of the golden features and its gradients."""
    numbers = golden("convirt")
    raw = [numbers["in.image_BD"].requires_grad_(), numbers["in.report_BD"].requires_grad_()]
    units = [F.normalize(rows_BD, dim=1) for rows_BD in raw]
    scale = torch.full((1,), 1 / temperature, dtype=torch.float64)
    loss = contrastive_loss(units[0], units[1], torch.arange(6), scale, film_weight)
    return loss.detach(), list(torch.autograd.grad(loss, raw))


def test_convirts_weighted_loss_and_gradients_are_the_published_ones() -> None:
    numbers = golden("convirt")
    for name, film_weight in (("weighted", 0.75), ("image_to_report", 1.0), ("report_to_image", 0.0)):
        loss, gradients = weighted(film_weight, 0.1)
        torch.testing.assert_close(loss, numbers[f"paper.loss_{name}"], **GOLDEN)
        for part, gradient in zip(("image_BD", "report_BD"), gradients, strict=True):
            torch.testing.assert_close(gradient, numbers[f"paper.grad_{name}.{part}"], **GOLDEN)


def test_mgcas_convirt_baseline_is_twice_our_loss_at_its_temperature() -> None:
    numbers = golden("convirt")
    loss, gradients = weighted(0.5, 0.07)
    torch.testing.assert_close(2 * loss, numbers["mgca_repo.loss_sum_007"], **GOLDEN)
    for part, gradient in zip(("image_BD", "report_BD"), gradients, strict=True):
        torch.testing.assert_close(2 * gradient, numbers[f"mgca_repo.grad.{part}"], **GOLDEN)
