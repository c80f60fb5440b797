"""The cheapest assignment of generated rows to a report's rows: the only part of PRIOR that has to be solved for each study.

B studies, Q rows, D embedding.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@torch.no_grad()
def matches(generated_BQD: Tensor, target_BQD: Tensor) -> Tensor:
    """Which generated row belongs to each target, (B, Q), with the least total L1 distance. Waits for the device once."""
    cost_BQQ = torch.cdist(wide(generated_BQD), wide(target_BQD), p=1.0).cpu().numpy()
    columns = np.stack([linear_sum_assignment(cost_QQ)[1] for cost_QQ in cost_BQQ])
    # the solver gives the target of each generated row; the release takes this for its inverse
    return torch.from_numpy(np.argsort(columns, axis=1)).to(generated_BQD.device)


def wide(rows: Tensor) -> Tensor:
    """``rows`` in at least float32."""
    return rows if rows.dtype == torch.float64 else rows.float()
