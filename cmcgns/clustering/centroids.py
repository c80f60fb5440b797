"""The centroids in force on this rank: versioned, equal on every rank, moved a little each step.

n sentences of this rank, K centroids, D embedding.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns.distributed import all_reduce


class Centroids:
    """Rank-local copy of the clustering; every rank adopts the same version at the same step."""

    def __init__(self, num_clusters: int, dim: int, device: torch.device | str, momentum: float) -> None:
        self.rows_KD = torch.zeros(num_clusters, dim, device=device)
        self.momentum = momentum
        self.version = 0
        self.started_at: int | None = None
        self._sums_KD = torch.zeros_like(self.rows_KD)
        self._counts_K = torch.zeros(num_clusters, device=device)

    @property
    def started(self) -> bool:
        """True once clustering-guided negatives are in force."""
        return self.started_at is not None

    @property
    def current(self) -> Tensor | None:
        """``rows_KD`` for the objective, or None before clustering has started."""
        return self.rows_KD if self.started else None

    def adopt(self, rows_KD: Tensor, version: int, step: int) -> None:
        """Take a new version into force from ``step`` on."""
        self.rows_KD = rows_KD.to(self.rows_KD.device, torch.float32)
        self.version = version
        self.started_at = step if self.started_at is None else self.started_at

    def observe(self, attended_nD: Tensor) -> None:
        """Remember one microbatch's normalised z2 for the online move at the end of the step."""
        if not self.started or self.momentum == 0:
            return
        attended_nD = attended_nD.detach().float()
        nearest_n = (attended_nD @ self.rows_KD.T).argmax(1)
        self._sums_KD.index_add_(0, nearest_n, attended_nD)
        self._counts_K.index_add_(0, nearest_n, torch.ones_like(nearest_n, dtype=torch.float32))

    def move(self) -> None:
        """c <- normalise((1 - m) c + m mean of its members on all ranks); empty clusters stay. Collective."""
        if not self.started or self.momentum == 0:
            return
        totals_KE = all_reduce(torch.cat([self._sums_KD, self._counts_K.unsqueeze(1)], dim=1))
        self.rows_KD = momentum_step(self.rows_KD, totals_KE[:, :-1], totals_KE[:, -1], self.momentum)
        self._sums_KD.zero_()
        self._counts_K.zero_()

    def digest(self) -> str:
        """Short hash of the rows, to compare ranks and runs."""
        return hashlib.blake2b(self.rows_KD.cpu().numpy().tobytes(), digest_size=8).hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Rows, version and the step of the start (-1 before it)."""
        started_at = -1 if self.started_at is None else self.started_at
        return {"rows_KD": self.rows_KD.cpu(), "version_and_start": torch.tensor([self.version, started_at])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict``."""
        self.rows_KD = state["rows_KD"].to(self.rows_KD.device)
        self.version, started_at = (int(value) for value in state["version_and_start"])
        self.started_at = None if started_at < 0 else started_at


def momentum_step(rows_KD: Tensor, sums_KD: Tensor, counts_K: Tensor, momentum: float) -> Tensor:
    """Centroids moved towards their members' means and put back on the sphere."""
    means_KD = sums_KD / counts_K.clamp(min=1).unsqueeze(1)
    moved_KD = F.normalize(unnormalised_momentum_step(rows_KD, means_KD, momentum), dim=1)
    return torch.where((counts_K > 0).unsqueeze(1), moved_KD, rows_KD)


def unnormalised_momentum_step(rows_KD: Tensor, means_KD: Tensor, momentum: float) -> Tensor:
    """(1 - m) c + m mean, as in ClusterNS."""
    return (1 - momentum) * rows_KD + momentum * means_KD
