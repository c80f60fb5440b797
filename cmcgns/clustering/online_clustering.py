"""Clustering during training: the current centroids, the bank of recent features, and the rule of when ranks adopt new centroids.

n rows of this rank, K centroids, D embedding.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmcgns import distributed
from cmcgns.clustering.bank import BankShard, BankState, RefreshRequest, RefreshResult, recluster
from cmcgns.clustering.kmeans import numpy_assign
from cmcgns.clustering.rows import RowArray
from cmcgns.config import MIN_BANK, ClusteringConfig
from cmcgns.distributed import all_reduce

logger = logging.getLogger(__name__)
CENTROIDS = "centroids."
"""Prefix of the entries of ``Centroids`` in a checkpoint."""


class Found(NamedTuple):
    """Centroids of a re-clustering, and how many rows of the bank each has as members."""

    rows_KD: Tensor
    counts_K: Tensor


class Centroids:
    """This rank's copy of the centroids; every rank adopts the same version at the same step."""

    def __init__(self, num_clusters: int, dim: int, device: torch.device | str, momentum: float) -> None:
        self.rows_KD = torch.zeros(num_clusters, dim, device=device)
        self.counts_K = torch.zeros(num_clusters, device=device)
        """Members of each centroid in the bank when this version was made; zeros if an earlier cmcgns made it."""
        self.momentum = momentum
        self.version = 0
        self.started_at: int | None = None
        self._sums_KD = torch.zeros_like(self.rows_KD)
        self._counts_K = torch.zeros(num_clusters, device=device)

    @property
    def started(self) -> bool:
        """Whether the objective uses clustering-guided negatives."""
        return self.started_at is not None

    @property
    def current(self) -> Tensor | None:
        """``rows_KD`` for the objective; None before clustering has started."""
        return self.rows_KD if self.started else None

    def adopt(self, rows_KD: Tensor, version: int, step: int, counts_K: Tensor | None = None) -> None:
        """Use a new version from ``step`` on."""
        self.rows_KD = rows_KD.to(self.rows_KD.device, torch.float32)
        self.counts_K = torch.zeros_like(self._counts_K) if counts_K is None else counts_K.to(self._counts_K)
        self.version = version
        self.started_at = step if self.started_at is None else self.started_at

    def observe(self, attended_nD: Tensor) -> None:
        """Add one microbatch's normalised z2 to the online move at the end of the step."""
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
        """Rows, members, version and the step at which clustering started (-1 before)."""
        started_at = -1 if self.started_at is None else self.started_at
        return {
            "rows_KD": self.rows_KD.to("cpu", copy=True),
            "counts_K": self.counts_K.to("cpu", copy=True),
            "version_and_start": torch.tensor([self.version, started_at]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore ``state_dict``."""
        self.rows_KD = state["rows_KD"].to(self.rows_KD.device)
        self.counts_K = state.get("counts_K", torch.zeros(len(self.rows_KD))).to(self._counts_K)
        self.version, started_at = (int(value) for value in state["version_and_start"])
        self.started_at = None if started_at < 0 else started_at


def momentum_step(rows_KD: Tensor, sums_KD: Tensor, counts_K: Tensor, momentum: float) -> Tensor:
    """Centroids moved towards their members' means and normalised."""
    means_KD = sums_KD / counts_K.clamp(min=1).unsqueeze(1)
    moved_KD = F.normalize(unnormalised_momentum_step(rows_KD, means_KD, momentum), dim=1)
    return torch.where((counts_K > 0).unsqueeze(1), moved_KD, rows_KD)


def unnormalised_momentum_step(rows_KD: Tensor, means_KD: Tensor, momentum: float) -> Tensor:
    """(1 - m) c + m mean, as in ClusterNS."""
    return (1 - momentum) * rows_KD + momentum * means_KD


class Pool(Protocol):
    """The bank and its re-clustering: Ray actors, or the twin in this process."""

    def push(self, step: int, first_ordinal: int, rows_nD: Tensor, counts: Sequence[int]) -> None:
        """Add this rank's rows of a step; does not wait."""

    def request(self, request: RefreshRequest) -> None:
        """Start a re-clustering (rank 0 only)."""

    def result(self) -> RefreshResult:
        """Wait for the re-clustering that was started last (rank 0 only)."""

    def save(self, step: int, first_ordinal: int, stop_ordinal: int) -> BankState:
        """Rows of the bank (rank 0 only)."""

    def reset(self, step: int, state: BankState | None) -> None:
        """Replace the bank by ``state``, as of ``step``; None empties it. Collective."""


class OnlineClustering:
    """Centroids, the bank, and when to request and adopt new centroids; the same on every rank."""

    def __init__(self, config: ClusteringConfig, centroids: Centroids, pool: Pool) -> None:
        self.config = config
        self.centroids = centroids
        self.pool = pool
        self.pushed = 0
        """Rows of all ranks so far, which is the next ordinal."""
        self._pushed_before = 0  # without those of the last step
        self.waited_s = 0.0
        """Time spent waiting for centroids."""
        self._in_flight = False
        self._received: list[Found | None] = []  # a result fetched early, for a checkpoint, and adopted at its step

    def push(self, step: int, attended: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Add one optimizer step's z2 of this rank (one tensor per microbatch); ``counts`` are the rows of every rank."""
        first_ordinal = self.pushed + sum(counts[: distributed.rank()])
        self.pool.push(step, first_ordinal, torch.cat(list(attended)), counts)
        self._pushed_before, self.pushed = self.pushed, self.pushed + sum(counts)

    def refresh(self, step: int, may_start: bool, mean_cosine: Tensor | None) -> None:
        """Move the centroids; every ``refresh_every`` steps adopt the requested ones and request the next. Collective.

        Clustering starts once ``may_start`` (the warm-up is over), the mean cosine of all ranks is low enough and the
        bank has max(4K, 1024) rows. The cosine is read on the host at these steps only, and only before the start. Without a
        cosine the first version is requested and adopted as soon as the bank has the rows.
        """
        self.centroids.move()
        if step % self.config.refresh_every and not (mean_cosine is None and self._just_filled):
            return
        self._adopt_result(step)
        if not self._is_filled(self.pushed):
            return
        if mean_cosine is None and not self.centroids.started:
            self._request(step)
            self._adopt_result(step)
        elif self.centroids.started or (mean_cosine is not None and self._can_start(step, may_start, mean_cosine)):
            self._request(step)

    def _is_filled(self, rows: int) -> bool:
        """Whether ``rows`` are enough for a clustering."""
        return min(rows, self.config.bank_size) >= max(4 * len(self.centroids.rows_KD), MIN_BANK)

    @property
    def _just_filled(self) -> bool:
        """Whether this step's rows were the last that a first clustering needs."""
        return not self.centroids.started and self._is_filled(self.pushed) and not self._is_filled(self._pushed_before)

    def _request(self, step: int) -> None:
        start_KD = self.centroids.rows_KD.cpu().numpy() if self.centroids.started else None
        self._in_flight, num_clusters = True, len(self.centroids.rows_KD)
        if distributed.rank() == 0:
            self.pool.request(
                RefreshRequest(self.centroids.version + 1, step, *self._bank_range(), num_clusters, start_KD)
            )

    def _can_start(self, step: int, may_start: bool, mean_cosine: Tensor) -> bool:
        mean = float(distributed.all_reduce(mean_cosine)) / distributed.world_size()
        return may_start and step >= self.config.start_step and mean <= self.config.start_cosine

    def _bank_range(self) -> tuple[int, int]:
        return max(self.pushed - self.config.bank_size, 0), self.pushed

    def _adopt_result(self, step: int) -> None:
        if not self._in_flight:
            return
        found = self._received.pop() if self._received else self._fetch_result()
        self._in_flight = False
        if found is not None:
            self.centroids.adopt(found.rows_KD, self.centroids.version + 1, step, found.counts_K)

    def _fetch_result(self) -> Found | None:
        """Rank 0's result from the pool, on every rank; None if the re-clustering failed."""
        before = time.perf_counter()
        result = self.pool.result() if distributed.rank() == 0 else None
        if result is not None and result.rows_KD is None:
            logger.warning("clustering: the centroids do not change: %s", result.report)
        received = None
        if distributed.broadcast_object(result is not None and result.rows_KD is not None):
            received = Found(torch.empty_like(self.centroids.rows_KD), torch.empty_like(self.centroids.counts_K))
            if result is not None:
                received.rows_KD.copy_(torch.from_numpy(result.rows_KD))
                received.counts_K.copy_(torch.from_numpy(result.counts_K))
            for part in received:
                distributed.broadcast(part)
        self.waited_s += time.perf_counter() - before
        return received

    def empty_bank(self, step: int) -> None:
        """Drop all features (stage change) and keep the centroids. Collective."""
        if self._in_flight and not self._received:
            self._fetch_result()
        self._in_flight, self._received, self.pushed, self._pushed_before = False, [], 0, 0
        self.pool.reset(step, None)

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """Centroids, bank, write position and any requested refresh; the bank on rank 0 only. Collective."""
        state = {f"{CENTROIDS}{key}": value for key, value in self.centroids.state_dict().items()}
        state["pushed"] = torch.tensor(self.pushed)
        if self._in_flight:
            self._received = self._received or [self._fetch_result()]
            early = self._received[0]
            state["in_flight_KD"] = torch.empty(0) if early is None else early.rows_KD.cpu()
            state["in_flight_counts_K"] = torch.empty(0) if early is None else early.counts_K.cpu()
        if distributed.rank() == 0:
            rows_ND, ordinals_N = self.pool.save(step, *self._bank_range())
            state["bank.rows_ND"] = torch.from_numpy(np.ascontiguousarray(rows_ND))
            state["bank.ordinals_N"] = torch.from_numpy(np.ascontiguousarray(ordinals_N))
        return state

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Restore ``state_dict``. Collective."""
        own = {key.removeprefix(CENTROIDS): value for key, value in state.items() if key.startswith(CENTROIDS)}
        self.centroids.load_state_dict(own)
        self.pushed = int(state["pushed"])
        self._in_flight = "in_flight_KD" in state
        if self._in_flight:
            early = Found(
                state["in_flight_KD"], state.get("in_flight_counts_K", torch.zeros(len(state["in_flight_KD"])))
            )
            device = self.centroids.rows_KD.device
            self._received = [Found(*(part.to(device) for part in early)) if early.rows_KD.numel() else None]
        self.pool.reset(step, BankState(state["bank.rows_ND"].numpy(), state["bank.ordinals_N"].numpy()))


class LocalPool:
    """The bank and its re-clustering in this process, on one array without FAISS: the oracle of the Ray pool.

    Every rank has a copy of the whole bank.
    """

    def __init__(self, config: ClusteringConfig) -> None:
        self.config = config
        self.bank = BankShard()
        self._result = RefreshResult(None, "nothing was requested")

    def push(self, step: int, first_ordinal: int, rows_nD: Tensor, counts: Sequence[int]) -> None:
        all_ND = distributed.ragged_all_gather(rows_nD, counts).cpu().numpy()
        self.bank.push(step, 0, first_ordinal - sum(counts[: distributed.rank()]), all_ND)

    def request(self, request: RefreshRequest) -> None:
        rows_ND, ordinals_N = self.bank.rows_between(request.first_ordinal, request.stop_ordinal)
        self._result = recluster(RowArray(rows_ND, ordinals_N, numpy_assign), request, self.config)
        self.bank.forget_before(request.first_ordinal)

    def result(self) -> RefreshResult:
        return self._result

    def save(self, step: int, first_ordinal: int, stop_ordinal: int) -> BankState:
        return BankState(*self.bank.rows_between(first_ordinal, stop_ordinal))

    def reset(self, step: int, state: BankState | None) -> None:
        self.bank = BankShard()
        if state is not None:
            self.bank.restore(step, state.rows_ND, state.ordinals_N)
