"""Parts of tensors that each rank stores, and how ranks of another number read them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmcgns import distributed, storage
from cmcgns.train.shards import read_shard, split, write_shard

SHAPES = ((1,), (5,), (7, 3), (2, 3, 5), (64,), (0, 4))


def whole() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    tensors = {f"tensor{i}": torch.randn(shape, generator=random) for i, shape in enumerate(SHAPES)}
    return tensors | {"steps": torch.tensor(11), "count": torch.arange(9)}


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)


def store(folder: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        parts = {name: split(tensor) for name, tensor in whole().items()}
        write_shard(folder / f"weights_{rank}.safetensors", parts, {name: t.numel() for name, t in whole().items()})


def check(folder: Path, saved_by: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks' parts in order are the whole, and none is longer than an even share."""
    found = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        found.append(read_shard(str(folder), "weights", saved_by))
    for name, tensor in whole().items():
        parts = [each[name] for each in found]
        if not tensor.dim():
            assert all(torch.equal(part, tensor) for part in parts)
            continue
        assert torch.equal(torch.cat(parts), tensor.flatten()), (name, saved_by, ranks)
        assert max(map(len, parts)) == -(-tensor.numel() // ranks)


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_reads_the_parts_of_any_other(
    saved_by: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, saved_by, monkeypatch)
    for ranks in (1, 2, 3, 5, 8):
        check(tmp_path, saved_by, ranks, monkeypatch)


def test_ranks_read_a_checkpoint_of_an_earlier_version_that_rank_0_has_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(whole(), tmp_path / "weights.safetensors")
    for ranks in (1, 2, 3):
        check(tmp_path, 0, ranks, monkeypatch)


def test_a_rank_opens_no_file_that_it_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"tensor": 64}
    for rank in range(4):
        part = torch.arange(16) + 16 * rank
        write_shard(tmp_path / f"weights_{rank}.safetensors", {"tensor": part}, sizes)
    opened: list[str] = []
    copy = storage.local_copy
    monkeypatch.setattr(storage, "local_copy", lambda uri: (opened.append(Path(uri).name), copy(uri))[1])
    for rank, ranks, expected in ((2, 4, [2]), (1, 2, [2, 3]), (0, 3, [0, 1]), (0, 1, [0, 1, 2, 3])):
        as_rank(monkeypatch, rank, ranks)
        read_shard(str(tmp_path), "weights", 4)
        assert sorted(opened) == [f"weights_{each}.safetensors" for each in expected]
        opened.clear()


def test_what_a_checkpoint_does_not_have_is_empty(tmp_path: Path) -> None:
    assert read_shard(str(tmp_path), "best", 2) == read_shard(str(tmp_path), "best", 0) == {}


def test_safetensors_reads_what_is_written_whatever_types_stand_together(tmp_path: Path) -> None:
    tensors = {
        "three floats": torch.randn(3),  # 12 bytes: what follows is not at a multiple of 8
        "steps": torch.tensor(7),
        "halves": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(2, 3).T,
        "count": torch.arange(9),
    }
    write_shard(tmp_path / "mixed.safetensors", tensors, {})
    found = load_file(tmp_path / "mixed.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
