"""The admission: no more trials inside than the cluster has capacity for now, and those that came last go when nodes are lost."""

import pytest

from cmcgns.errors import UserError
from cmcgns.sweep import admission as gate_module
from cmcgns.sweep.admission import Admission, Capacity
from cmcgns.train.run import Share


class Cluster:
    """As much capacity as the test says."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def capacity(self) -> Capacity:
        if not self.trials:
            raise UserError("not one trial fits")
        return Capacity(self.trials, Share(2.0 * self.trials, 1.0, beside_others=True))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(gate_module, "RECHECK_S", -1.0)
    return Cluster(2)


def test_as_many_enter_as_there_is_room_for_and_each_that_leaves_lets_one_in(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    assert [admission.enter(number) is not None for number in (4, 5, 6)] == [True, True, False]
    admission.leave(4)
    share = admission.enter(6)
    assert share is not None
    assert share.all == 4.0
    admission.leave(9)  # was never inside
    assert admission.enter(4) is None


def test_after_a_loss_the_last_to_come_go_and_those_that_come_again_wait(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    for number in (4, 5):
        admission.enter(number)
    cluster.trials = 1
    assert [admission.must_leave(number) for number in (4, 5)] == [False, True]
    assert admission.enter(4) is None  # its process was lost: by coming again it has left, and 5 may stay
    assert not admission.must_leave(5)
    cluster.trials = 2
    assert admission.enter(4) is not None


def test_an_emptied_gate_lets_in_anew_and_a_trial_is_excused_once(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    for number in (4, 5):
        admission.enter(number)
    admission.clear()
    assert all(admission.enter(number) is not None for number in (6, 7))
    admission.excuse(6)
    assert [admission.is_excused(number) for number in (7, 6, 6)] == [False, True, False]


def test_where_not_one_fits_all_leave_and_the_reason_is_kept_until_nodes_come(cluster: Cluster) -> None:
    admission = Admission(cluster.capacity)
    admission.enter(1)
    cluster.trials = 0
    assert admission.must_leave(1)
    assert admission.enter(1) is None
    assert admission.refusal == "not one trial fits"
    cluster.trials = 1
    assert admission.enter(1) is not None
    assert admission.refusal is None
