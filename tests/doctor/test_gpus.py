"""The doctor's checks of GPUs, as far as a machine without one can show them."""

from pathlib import Path

import pytest
import torch

from cmcgns.cluster.check_results import Requirements
from cmcgns.cluster.gpu_checks import Card, card_checks, faiss_checks, gpu_checks, nccl_checks, read_cards, reduce_here
from cmcgns.errors import UserError

SAID = """0, NVIDIA H100 80GB HBM3, 535.129.03, 3, 0, 16, 16
1, NVIDIA H100 80GB HBM3, 535.129.03, 41204, 2, 8, 16
2, Tesla P40, 535.129.03, 10, [N/A], 16, 16
"""
"""In nvidia-smi's form for --format=csv,noheader,nounits."""


@pytest.fixture
def three_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program called nvidia-smi that answers as on a machine with three GPUs."""
    (tmp_path / "answer").write_text(SAID)
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$2" = --format=csv,noheader,nounits ] && cat {tmp_path / "answer"}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("three_cards")
def test_memory_errors_other_processes_and_narrow_links_are_named() -> None:
    cards = read_cards()
    assert cards[0] == Card(0, "NVIDIA H100 80GB HBM3", "535.129.03", 3, 0, 16, 16)
    assert cards[2].memory_errors is None
    errors, used, lanes = card_checks("here", cards)
    assert (errors.level, used.level, lanes.level) == ("failed", "warning", "warning")
    assert "GPU 1 (NVIDIA H100 80GB HBM3) has had 2 memory errors" in errors.detail
    assert "GPU 1 (NVIDIA H100 80GB HBM3): 41204 MiB are in use" in used.detail
    assert "8 of 16 PCIe lanes" in lanes.detail


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        ("13.0", "torch sees none of 3, with driver 535.129.03 and CUDA 13.0: it needs 580 or newer, and"),
        ("12.6", "torch sees none of 3, with driver 535.129.03 and CUDA 12.6, and"),
        (None, f"torch sees none of 3, since torch {torch.__version__} is a build without CUDA, and"),
    ],
)
def test_gpus_that_torch_does_not_see_are_explained(
    cuda: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    *_, line = gpu_checks("here", Requirements(use_gpu=True, deepspeed=False, faiss_gpu=False), gpus=None)
    assert line.level == "failed"
    assert line.detail.startswith(reason)


def test_without_nvidia_smi_no_card_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_cards() == []


@pytest.mark.distributed
def test_the_ranks_of_one_machine_reduce_to_the_right_sum() -> None:
    assert 0 < reduce_here("gloo", ranks=3, mebibytes=1, timeout_s=60) < 1000


def test_nccl_that_fails_is_one_line_with_its_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"rank \d of 2 failed: .*(?i:cuda|nvidia)"):
        reduce_here("nccl", ranks=2, mebibytes=1, timeout_s=60)
    (line,) = nccl_checks("here", 2, "NVIDIA H100 80GB HBM3", 1, 60)
    assert line.level == "failed"
    assert list(nccl_checks("here", 1, "NVIDIA L4", 1, 60)) == []  # nobody to reduce with


def test_a_rank_that_fails_is_named_though_another_one_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-card")
    with pytest.raises(UserError, match=r"rank \d of 3 failed: .*no-such-card"):
        reduce_here("gloo", ranks=3, mebibytes=1, timeout_s=60)


def test_ranks_that_take_too_long_are_ended() -> None:
    with pytest.raises(UserError, match=r"rank 0 of 2 did not answer within 0 s"):
        reduce_here("gloo", ranks=2, mebibytes=1, timeout_s=0.01)


def test_a_node_without_gpus_needs_faiss_for_gpus_but_searches_on_none() -> None:
    needed = Requirements(use_gpu=True, deepspeed=False, faiss_gpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmcgns.cluster.gpu_checks.check_faiss", lambda device: None)  # as if the GPU build were there
        patch.setattr("cmcgns.cluster.gpu_checks.is_installed", lambda name: name == "faiss-gpu")
        (line,) = faiss_checks("head", needed, gpus=0)
    assert (line.level, line.detail) == ("ok", "GPU build")
    (line,) = faiss_checks("head", needed, gpus=0)
    assert line.level == "failed"
    assert "needs faiss-gpu" in line.detail


@pytest.mark.parametrize(("speed", "level"), [(300.0, "ok"), (40.0, "warning")])
def test_a_slow_link_is_a_warning_beside_what_the_card_can_reach(
    speed: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmcgns.cluster.gpu_checks.reduce_here", lambda *_: speed)
    (line,) = nccl_checks("here", 8, "NVIDIA H100 80GB HBM3", 64, 60)
    assert line.level == level
    assert (
        f"over 8 GPUs: {speed:.1f} GB/s on the bus, cards like NVIDIA H100 80GB HBM3 can reach about 450" in line.detail
    )
