"""Admission: at most as many trials as fit on the cluster now; the last ones are evicted if nodes are lost."""

import pytest

from cmcgns.errors import UserError
from cmcgns.sweep import admission as admission_module
from cmcgns.sweep.admission import Admission, Capacity
from cmcgns.train.run import CpuShare


class Cluster:
    """A cluster with the capacity that the test sets."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def capacity(self) -> Capacity:
        if not self.trials:
            raise UserError("not one trial fits")
        return Capacity(self.trials, CpuShare(2.0 * self.trials, 1.0, shared_cluster=True))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(admission_module, "RECHECK_S", -1.0)
    return Cluster(2)


def test_as_many_are_admitted_as_fit_and_each_that_leaves_admits_another(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    assert [admission.enter(number) is not None for number in (4, 5, 6)] == [True, True, False]
    admission.leave(4)
    share = admission.enter(6)
    assert share is not None
    assert share.all == 4.0
    admission.leave(9)  # was never admitted
    assert admission.enter(4) is None


def test_after_a_loss_the_last_admitted_are_evicted_and_wait_again(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    for number in (4, 5):
        admission.enter(number)
    cluster.trials = 1
    assert [admission.must_leave(number) for number in (4, 5)] == [False, True]
    assert admission.enter(4) is None  # its process was lost: entering again releases it, and 5 may stay
    assert not admission.must_leave(5)
    cluster.trials = 2
    assert admission.enter(4) is not None


def test_a_cleared_admission_admits_again_and_a_trial_is_excused_once(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    for number in (4, 5):
        admission.enter(number)
    admission.clear()
    assert all(admission.enter(number) is not None for number in (6, 7))
    admission.excuse(6)
    assert [admission.is_excused(number) for number in (7, 6, 6)] == [False, True, False]


def test_if_not_one_fits_all_are_evicted_and_the_reason_is_kept_until_nodes_join(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    admission.enter(1)
    cluster.trials = 0
    assert admission.must_leave(1)
    assert admission.enter(1) is None
    assert admission.refusal == "not one trial fits"
    cluster.trials = 1
    assert admission.enter(1) is not None
    assert admission.refusal is None
