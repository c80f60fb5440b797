"""Online clustering of each bank of a method; empty for a method without clustering."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cmcgns.clustering.online_clustering import OnlineClustering
from cmcgns.config import Bank
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.base import BankCentroids, Losses
from cmcgns.train.shards import State


class Banks:
    """One ``OnlineClustering`` per bank, in the method's order.

    In checkpoints and metrics the first bank's names have no prefix; those of later banks start with the bank's name.
    """

    def __init__(
        self, banks: Sequence[Bank], clusterings: Sequence[OnlineClustering], statistics: Sequence[str] = ()
    ) -> None:
        self.clusterings = dict(zip(banks, clusterings, strict=True))
        self.statistics = list(statistics)

    @property
    def first(self) -> OnlineClustering | None:
        """Clustering of the first bank, which the summary of a run reports."""
        return next(iter(self.clusterings.values()), None)

    @property
    def centroids(self) -> BankCentroids:
        """Current centroids and their members by bank."""
        both = {bank.name: each.centroids for bank, each in self.clusterings.items()}
        return BankCentroids(
            {name: each.current for name, each in both.items()}, {name: each.counts_K for name, each in both.items()}
        )

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for centroids so far."""
        return sum(each.waited_s for each in self.clusterings.values())

    def facts(self) -> dict[str, Any]:
        """Centroid versions, for a row of metrics."""
        versions = {bank: each.centroids.version for bank, each in self.clusterings.items()}
        return {f"{self._prefix(bank)}centroids_version": version for bank, version in versions.items()}

    def observe(self, losses: Losses) -> None:
        """Keep one microbatch's rows for the centroid update at the end of the step."""
        for bank, each in self.clusterings.items():
            each.centroids.observe(losses.bank_rows[bank.name])

    def advance(
        self, step: int, warmed_up: bool, losses: Sequence[Losses], microbatches: Sequence[ImageReportBatch]
    ) -> None:
        """Push the step's rows, and refresh the centroids if due. Collective."""
        for bank, each in self.clusterings.items():
            ranks = zip(*(batch.rank_sentences for batch in microbatches), strict=True)
            each_of = [sum(column) if bank.per_sentence else sum(b.studies for b in microbatches) for column in ranks]
            counts = [bank.rows_each * number for number in each_of]
            each.push(step, [loss.bank_rows[bank.name] for loss in losses], counts)
            statistic = None
            if bank.start_statistic is not None:
                index = self.statistics.index(bank.start_statistic)
                statistic = torch.stack([loss.statistics[index] for loss in losses]).mean()
            each.refresh(step, warmed_up, statistic)

    def empty(self, step: int) -> None:
        """Drop all rows (new stage, replaced workers) and keep the centroids. Collective."""
        for each in self.clusterings.values():
            each.empty_bank(step)

    def centroids_state(self) -> State:
        """Centroids, versions and start steps, without rows."""
        return self._joined({bank: each.centroids.state_dict() for bank, each in self.clusterings.items()})

    def load_centroids(self, state: State) -> None:
        """Restore what ``centroids_state`` returned."""
        for bank, each in self.clusterings.items():
            each.centroids.load_state_dict(self._part(bank, state))

    def state_dict(self, step: int) -> State:
        """Centroids, rows and refreshes in flight; the rows on rank 0 only. Collective."""
        return self._joined({bank: each.state_dict(step) for bank, each in self.clusterings.items()})

    def load_state_dict(self, state: State, step: int) -> None:
        """Restore what ``state_dict`` returned. Collective."""
        for bank, each in self.clusterings.items():
            each.load_state_dict(self._part(bank, state), step)

    def _prefix(self, bank: Bank) -> str:
        return "" if bank == next(iter(self.clusterings)) else f"{bank.name}/"

    def _joined(self, states: Mapping[Bank, State]) -> State:
        return {f"{self._prefix(bank)}{key}": value for bank, state in states.items() for key, value in state.items()}

    def _part(self, bank: Bank, state: State) -> State:
        prefix = self._prefix(bank)
        if prefix:
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        others = tuple(f"{each.name}/" for each in self.clusterings if each != bank) or ("\0",)
        return {key: value for key, value in state.items() if not key.startswith(others)}
