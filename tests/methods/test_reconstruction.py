"""The reconstruction error against a loop over patches and pixels."""

import torch

from cmcgns.data.batch import mask_positions
from cmcgns.methods.cm_cgns.losses import reconstruction_loss

EXACT = {"rtol": 0.0, "atol": 1e-12}


def test_only_the_pixels_of_masked_patches_count() -> None:
    image_B1HW, rebuilt_B1HW = torch.rand(2, 3, 1, 12, 12, dtype=torch.float64) * 2 - 1
    masked_BP = mask_positions(torch.arange(3), 9, 0.4)  # round(3.6) = 4 of 9
    errors = []
    for b in range(3):
        for row in range(12):
            for column in range(12):
                if masked_BP[b, row // 4 * 3 + column // 4]:
                    errors.append((image_B1HW[b, 0, row, column] - rebuilt_B1HW[b, 0, row, column]).abs())
    assert len(errors) == 3 * 4 * 16
    found = reconstruction_loss(rebuilt_B1HW, image_B1HW, masked_BP, only_masked=True)
    torch.testing.assert_close(found, torch.stack(errors).mean(), **EXACT)


def test_visible_pixels_receive_no_gradient() -> None:
    image_B1HW, rebuilt_B1HW = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, requires_grad=True)
    masked_BP = torch.tensor([[True, False, False, True]])
    reconstruction_loss(rebuilt_B1HW, image_B1HW, masked_BP, only_masked=True).backward()
    assert rebuilt_B1HW.grad is not None
    expected_HW = torch.kron(torch.eye(2), torch.ones(2, 2)) / 8
    assert torch.equal(rebuilt_B1HW.grad[0, 0], expected_HW)


def test_all_pixels_count_alike_as_published() -> None:
    image_B1HW, rebuilt_B1HW = torch.rand(2, 3, 1, 12, 12, dtype=torch.float64)
    found = reconstruction_loss(rebuilt_B1HW, image_B1HW, mask_positions(torch.arange(3), 9, 0.5), only_masked=False)
    torch.testing.assert_close(found, (image_B1HW - rebuilt_B1HW).abs().mean(), **EXACT)
