"""Placement on nodes, for made-up clusters."""

from collections.abc import Iterator

import pytest
import ray

from cmcgns.cli import load_config
from cmcgns.cluster.placement import (
    DATA,
    ROLE,
    Node,
    data_label,
    describe_placement,
    pool_nodes,
    pool_strategies,
    wait_for_resources,
)
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.train.run import check_data_nodes, whole_cluster
from tests.jobs import TINY

GPU = Node("g" * 56, "gpu-1", 48, 8)
PLAIN = Node("c" * 56, "cpu-1", 16, 0)
FOR_DATA = Node("d" * 56, "data-1", 32, 0, {ROLE: DATA})
HEAD = Node("a" * 56, "head", 0, 0)


def config(*words: str) -> Config:
    return load_config(["--config", str(TINY), *words], Config, None)


def test_the_pool_goes_to_nodes_labelled_for_data_first_then_to_nodes_without_gpus() -> None:
    assert pool_nodes([HEAD, GPU, PLAIN, FOR_DATA], 4) == [FOR_DATA]
    assert pool_nodes([HEAD, GPU, PLAIN], 4) == [PLAIN]
    assert pool_nodes([HEAD, GPU], 4) == [], "if all are alike Ray chooses"
    assert pool_nodes([HEAD, PLAIN], 4) == []
    assert pool_nodes([GPU, PLAIN, FOR_DATA], 33) == [], "none is large enough"


def test_actors_alternate_between_the_nodes_and_may_leave_them() -> None:
    second = Node("e" * 56, "data-2", 32, 0, {ROLE: DATA})
    strategies = pool_strategies([GPU, FOR_DATA, second], 3, 4)
    assert [each.node_id for each in strategies] == [FOR_DATA.id, second.id, FOR_DATA.id]
    assert all(each.soft for each in strategies)


def test_data_tasks_require_the_label_only_if_a_living_node_has_it() -> None:
    assert data_label([HEAD, GPU, PLAIN]) is None
    assert data_label([GPU, FOR_DATA]) == {ROLE: DATA}


def test_data_counts_on_labelled_nodes_less_the_pool() -> None:
    settings = config("--clustering.actors=2", "--clustering.cpus_per_actor=4")
    assert whole_cluster(settings, [HEAD, GPU, FOR_DATA]).data == 32 - 8
    train = settings.train
    everywhere = whole_cluster(settings, [HEAD, GPU, PLAIN])
    assert everywhere.data == 48 + 16 - 8 - train.num_workers * train.cpus_per_worker


def test_a_pool_that_fills_the_nodes_labelled_for_data_is_refused_with_numbers() -> None:
    settings = config("--clustering.actors=4", "--clustering.cpus_per_actor=8")
    with pytest.raises(
        UserError, match=r"1 nodes labelled .* 32 CPUs, and 4 clustering actors of 8\.0 leave less than one"
    ):
        check_data_nodes(settings, [GPU, FOR_DATA])
    check_data_nodes(settings, [GPU, PLAIN])


def test_the_plan_says_what_goes_where() -> None:
    said = describe_placement(config(), [GPU, FOR_DATA])
    assert said == (
        "1 x 48 CPUs + 8 GPUs, 1 x 32 CPUs for data; workers on as few nodes as possible, clustering on data-1 first, "
        "data tasks on data-1 only"
    )
    assert describe_placement(config(), [PLAIN]) == "1 x 16 CPUs"


def test_only_launched_clusters_can_scale_up() -> None:
    launched = Node("l" * 56, "head", 0, 0, {"ray.io/node-group": "head"})
    own = Node("o" * 56, "h1", 2, 0, {"ray.io/node-group": "local.cluster.node"})
    assert launched.is_launched
    assert not own.is_launched
    assert not PLAIN.is_launched


@pytest.fixture
def launched_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster whose node has a launcher's label, and that never gets another node."""
    monkeypatch.setenv("RAY_NODE_TYPE_NAME", "head")
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.ray
def test_missing_resources_are_reported_with_numbers_and_the_request_is_released(launched_ray: None) -> None:
    lines: list[str] = []
    wait_for_resources([{"CPU": 1.0, "GPU": 0.0}] * 2, lines.append)
    assert lines == []
    with pytest.raises(
        UserError,
        match=r"within 0\.017 minutes: .* needs 3 CPUs and 1 GPUs; the cluster has 2 CPUs, .* 2 CPUs are free",
    ):
        wait_for_resources([{"CPU": 3.0, "GPU": 1.0}], lines.append, timeout_s=1)
    (waiting,) = lines
    assert waiting.startswith("waiting for its autoscaler: the job needs 3 CPUs and 1 GPUs; the cluster has 2 CPUs")
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
