"""Each task of an evaluation runs on the device it is given: shown on a stand-in for a GPU, with the numbers of the CPU."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.features import features_uri
from cmcgns.evaluate.heads import build_dense, fit_head, mean_loss, output_of
from cmcgns.evaluate.run import check_workers, describe_workers, evaluation_bundles, task_variables
from cmcgns.evaluate.tasks.segmentation import STRIDE, dice_and_cross_entropy
from cmcgns.models.device import autocast, unit_rows
from tests.evaluate.heads import SET, rectangles, small_spec
from tests.jobs import REPOSITORY
from tests.small import small_config

ON_GPU = {
    "embed", "run_feature_task zeroshot", "run_feature_task classification", "run_film_head segmentation",
    "run_film_head detection", "run_film_head classification", "cmcgns.evaluate.features.EmbedFilms",
    "cmcgns.evaluate.embed.EmbedSentences", "cmcgns.search.build.EmbedFilms",
}  # fmt: skip
"""What runs a model or trains a head."""
ON_CPU = {"reading", "studies_digest", "run_pair_task retrieval", "run_pair_task clusters", "run_pair_task grounding"}
"""What reads files or compares embeddings."""


@pytest.fixture(scope="module", name="found")
def fixture_found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same evaluation on the CPU and on the stand-in."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.evaluate.on_stand_in", str(tmp_path_factory.mktemp("gpu"))]
    variables = os.environ | task_variables(EvaluateConfig(use_gpu=True))
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_task_that_runs_a_model_or_trains_a_head_runs_on_its_gpu(found: list[dict[str, Any]]) -> None:
    on_cpu, on_gpu = found
    assert on_cpu["failures"] == on_gpu["failures"] == []
    assert {each["name"] for each in on_gpu["log"]} == ON_GPU | ON_CPU
    for each in on_gpu["log"]:
        heavy = each["heavy"]
        if each["name"] in ON_GPU:
            assert (each["gpus"], heavy.keys()) == (1, {"device"}), each
        else:
            assert (each["gpus"], heavy.get("device", 0)) == (0, 0), each
    assert not any(each["gpus"] or "device" in each["heavy"] for each in on_cpu["log"])


def test_a_device_with_the_arithmetic_of_the_cpu_gives_the_scores_of_the_cpu(found: list[dict[str, Any]]) -> None:
    on_cpu, on_gpu = found
    assert len(on_cpu["scores"]) > 70
    # another kernel of attention differs in the last bits
    assert on_gpu["scores"] == pytest.approx(on_cpu["scores"], rel=1e-5)
    assert len(on_cpu["vectors"]) == 9
    assert on_gpu["vectors"].keys() == on_cpu["vectors"].keys()
    for name, rows in on_cpu["vectors"].items():
        np.testing.assert_allclose(np.array(on_gpu["vectors"][name]), np.array(rows), atol=1e-5)


def test_half_precision_embeds_within_a_hundredth_and_trains_a_head_as_far() -> None:
    spec, films = small_spec(size=64), rectangles(6, 64)
    encoder, cpu = spec.load(), torch.device("cpu")
    image_B1HW = torch.rand(6, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = {}
    for precision in ("fp32", "bf16"):
        with torch.no_grad(), autocast(cpu, precision):
            shared_BD = encoder(image_B1HW)[1]
        assert shared_BD is not None
        rows[precision] = unit_rows(shared_BD, precision)
    assert np.abs(np.linalg.norm(rows["bf16"], axis=1) - 1).max() < 1e-6
    assert 0 < np.abs(rows["bf16"] - rows["fp32"]).max() < 0.01
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = EvaluateConfig(head_steps=20, head_batch=6, head_rate=3e-3)
        model = build_dense(spec.load(), 64, STRIDE, 2, False, seed=0, precision=precision)
        untrained = mean_loss(model, dice_and_cross_entropy, films, 6)
        fit_head(model, dice_and_cross_entropy, films, films, settings, seed=0)
        assert output_of(model, films.film_NRR).dtype == torch.float32
        losses[precision] = mean_loss(model, dice_and_cross_entropy, films, 6)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["fp32"] < 0.95 * untrained


def test_features_in_half_precision_have_a_file_of_their_own() -> None:
    spec = small_spec()
    plain, half = features_uri("f", spec, SET), features_uri("f", spec, SET, "bf16")
    assert half == plain.replace(".parquet", "-bf16.parquet")


def test_gpus_are_in_the_plan_and_too_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = EvaluateConfig(workers=2, cpus_per_worker=0.5, use_gpu=True)
    # a task takes the GPU of a worker, and one CPU on that machine
    assert evaluation_bundles(on_gpu) == [{"CPU": 1.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}] * 2
    assert evaluation_bundles(EvaluateConfig(cpus_per_worker=0.5))[0] == {"CPU": 0.5, "GPU": 0.0}
    assert describe_workers(on_gpu) == "2 x 0.5 CPU + GPU; tasks of 1 CPU + GPU, fp32"
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(UserError, match=r"evaluate.workers 2 of 1 GPUs need more than the cluster's 1"):
        check_workers(on_gpu, small_config())
    check_workers(on_gpu.model_copy(update={"workers": 1}), small_config())
