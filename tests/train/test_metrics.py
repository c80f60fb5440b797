"""Recall with duplicates, rows of metrics, and the log of a resumed run."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cmcgns.methods.base import Losses, load_method
from cmcgns.models.retrieval import recall
from cmcgns.train.metrics import RunLog, StepMetrics
from tests.small import small_config


@pytest.mark.parametrize("number", [3, 40])
def test_recall_counts_every_item_of_the_same_text_as_a_hit(number: int) -> None:
    source = torch.Generator().manual_seed(0)
    image_ND, report_ND = (F.normalize(torch.randn(number, 6, generator=source), dim=1) for _ in range(2))
    report_ND = F.normalize(report_ND + 0.5 * image_ND, dim=1)
    hash_N = torch.randint(0, max(number // 2, 2), (number,), generator=source)
    expected = {f"{way}_recall_at_{k}": 0 for way in ("i2t", "t2i") for k in (1, 5)}
    chance = 0.0
    for i in range(number):
        for way, query, items in (("i2t", image_ND[i], report_ND), ("t2i", report_ND[i], image_ND)):
            ranked = sorted(range(number), key=lambda j: -float(query @ items[j]))
            for k in (1, 5):
                expected[f"{way}_recall_at_{k}"] += any(hash_N[j] == hash_N[i] for j in ranked[:k])
        chance += sum(bool(hash_N[j] == hash_N[i]) for j in range(number)) / number
    for chunk in (7, 1024):
        found = recall(image_ND, report_ND, hash_N, chunk)
        for name, hits in expected.items():
            assert found[name] == pytest.approx(hits / number), name
        assert found["chance_recall_at_1"] == pytest.approx(chance / number)
        assert (found["studies"], found["distinct_reports"]) == (number, len(set(hash_N.tolist())))


def test_chance_is_what_a_random_ranking_reaches() -> None:
    source = torch.Generator().manual_seed(0)
    hash_N = torch.randint(0, 4, (2000,), generator=source)
    image_ND, report_ND = (F.normalize(torch.randn(2000, 32, generator=source), dim=1) for _ in range(2))
    found = recall(image_ND, report_ND, hash_N)
    # 2000 draws of about 1/4: the standard error is 0.01
    assert found["i2t_recall_at_1"] == pytest.approx(found["chance_recall_at_1"], abs=0.04)


def test_perfect_embeddings_are_always_found() -> None:
    rows_ND = torch.eye(9)
    found = recall(rows_ND, rows_ND, torch.arange(9))
    assert found["i2t_recall_at_1"] == found["t2i_recall_at_1"] == 1.0
    assert found["chance_recall_at_1"] == pytest.approx(1 / 9)


METHOD = load_method(small_config())


def losses_of(value: float, stage: int = 1) -> Losses:
    terms, statistics = (
        torch.full((len(METHOD.terms(stage)),), value),
        torch.full((len(METHOD.statistics),), 10 * value),
    )
    return Losses(total=terms[0], terms=terms, statistics=statistics)


def test_a_row_is_the_mean_over_microbatches_and_leaves_out_what_its_stage_lacks() -> None:
    metrics = StepMetrics(METHOD)
    metrics.record({"step": 1, "stage": 1}, [losses_of(1.0), losses_of(3.0)], torch.tensor(2.5))
    [first] = metrics.rows()  # a stage's last step is always written
    metrics.record({"step": 2, "stage": 2}, [losses_of(5.0, stage=2)], torch.tensor(torch.inf))
    [second] = metrics.rows()
    assert (first["loss"], first["mean_cosine"], second["loss"]) == (2.0, 20.0, 5.0)
    assert "loss_reconstruction" not in first
    assert second["loss_reconstruction"] == 5.0
    assert (first["gradient_norm"], second["gradient_norm"]) == (2.5, None)
    assert metrics.rows() == []


def test_a_resumed_log_drops_rows_beyond_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), tmp_path, step=0)
    log.write([{"step": step, "stage": 1, "split": "train", "loss": 1.0} for step in range(1, 8)])
    log.close()
    log = RunLog(str(tmp_path), tmp_path, step=4)
    log.write([{"step": step, "stage": 1, "split": "train", "loss": 2.0} for step in range(5, 7)])
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(s, 1.0) for s in range(1, 5)] + [(5, 2.0), (6, 2.0)]


def test_a_row_that_was_never_written_to_its_end_does_not_stop_a_resume(tmp_path: Path) -> None:
    whole = [json.dumps({"step": step, "split": "train"}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(whole) + '\n{"step": 4, "spl')
    RunLog(str(tmp_path), tmp_path, step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole[:2]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_features_that_are_all_alike_or_no_numbers_find_nothing(value: float) -> None:
    rows_ND = torch.full((20, 4), value)
    found = recall(rows_ND, rows_ND, torch.arange(20))
    assert found["i2t_recall_at_5"] == found["t2i_recall_at_5"] == 0.0
