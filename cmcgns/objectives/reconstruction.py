"""Loss 4: the L1 error of rebuilt films.

B studies, P patches (g x g).
"""

from torch import Tensor
from torch.nn import functional as F


def reconstruction_loss(
    reconstruction_B1HW: Tensor, image_B1HW: Tensor, masked_BP: Tensor, only_masked: bool
) -> Tensor:
    """Mean absolute error in units of the [-1, 1] range, over the pixels of masked patches or over all."""
    error_B1HW = (reconstruction_B1HW - image_B1HW).abs()
    if not only_masked:
        return error_B1HW.mean()
    grid = int(masked_BP.shape[1] ** 0.5)
    error_BP = F.avg_pool2d(error_B1HW, error_B1HW.shape[-1] // grid).flatten(1)
    # every study hides the same number of equal patches, so the mean over them is the mean over pixels
    return (error_BP * masked_BP).sum() / masked_BP.sum()
