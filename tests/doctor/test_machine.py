"""The doctor on a machine without a cluster, and its parts that need none."""

import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path

import pytest

from cmcgns.cli import load_config
from cmcgns.cluster import gpu_checks, machine_checks
from cmcgns.cluster.check_results import Requirements
from cmcgns.cluster.cluster_checks import pair_rounds
from cmcgns.doctor import PORTS, DoctorJobConfig, main, port_checks

REQUIRED = Requirements(use_gpu=False, deepspeed=True, faiss_gpu=False)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def visit(*arguments: str) -> int:
    return main(load_config(list(arguments), DoctorJobConfig, None))


def test_a_machine_that_can_train_has_no_failed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visit(f"--run.storage={tmp_path / 'runs'}", "--doctor.megabytes=1") == 0
    said = capsys.readouterr().out
    assert "0 failed" in said
    for subject in ("versions", "GPU", "FAISS", "DeepSpeed", "shared memory", "disk", "ports", "run.storage"):
        assert subject in said
    assert not (tmp_path / "runs").exists(), "the doctor leaves no files"


def test_missing_data_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visit(f"--run.storage={tmp_path}", f"--data.uri={tmp_path / 'films'}", "--doctor.megabytes=1") == 1
    said = capsys.readouterr().out
    assert f"data.uri        {socket.gethostname()}: {tmp_path / 'films'}: nothing is there" in said
    assert "1 failed" in said


def test_storage_that_cannot_be_written_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert visit(f"--run.storage={tmp_path / 'file'}", "--doctor.megabytes=1") == 1
    assert f"{tmp_path / 'file'}: " in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")
    )


def test_required_gpus_that_are_missing_fail() -> None:
    lines = list(gpu_checks.gpu_checks("here", Requirements(True, True, False), gpus=None))
    if lines[0].level == "ok":
        pytest.skip("this machine has a GPU")
    assert lines[0].level == "failed"
    (counted,) = gpu_checks.gpu_checks("here", REQUIRED, gpus=2)
    assert counted.level == "failed"
    assert "sees 0 GPUs, Ray counts 2" in counted.detail


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of a head node that is in use."""
    for port in PORTS:
        with closing(socket.socket()) as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue  # already in use, by a Ray on this machine
            listener.listen()
            yield port
            return
    yield min(PORTS)


def test_a_taken_port_is_named_with_the_option_that_moves_it(taken_port: int) -> None:
    line = next(line for line in port_checks("here") if str(taken_port) in line.detail)
    assert line.level == "warning"
    assert PORTS[taken_port] in line.fix


def test_versions_have_a_hash_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "cmcgns"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(machine_checks.cmcgns, "__file__", str(package / "__init__.py"))
    before = machine_checks.versions()["cmcgns"]
    (package / "__init__.py").write_text("a = 2\n")
    assert machine_checks.versions()["cmcgns"] != before


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_every_pair_is_measured_once_and_no_node_twice_in_a_round(nodes: int) -> None:
    rounds = pair_rounds(nodes)
    assert sorted(pair for turn in rounds for pair in turn) == sorted(combinations(range(nodes), 2))
    for turn in rounds:
        met = [node for pair in turn for node in pair]
        assert len(met) == len(set(met))
