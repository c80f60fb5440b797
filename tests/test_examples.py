"""The files that docs pages add outside the package: a method, a backbone, a reader and a task, each through its job."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from cmcgns.clustering.bank import RefreshRequest, recluster
from cmcgns.clustering.kmeans import farthest_point_seeds, kmeans, numpy_assign
from cmcgns.clustering.rows import RowArray
from cmcgns.config import ClusteringConfig
from cmcgns.errors import UserError
from cmcgns.library.runs import open_run
from cmcgns.phantom import PhantomCorpus
from tests.jobs import REPOSITORY, Job, rows, run_here
from tests.ray_head import RayHead

EXAMPLES = REPOSITORY / "examples"
SHORT = (
    "--train.stage1_steps=3", "--train.stage2_steps=0", "--train.warmup_steps=1", "--train.num_workers=1",
    "--train.threads_per_worker=1", "--train.microbatch_size=8", "--train.global_batch_size=8", "--train.engine=torch",
    "--train.zero_stage=0",
)  # fmt: skip


FAILS_ONCE = """
from pathlib import Path

undisturbed = METHOD.losses


def losses(self, outputs, batch, centroids, stage, step):
    mark = Path(__file__).with_name("failed")
    if step == 2 and not mark.exists():
        mark.touch()
        raise RuntimeError("an error that passes")
    return undisturbed(self, outputs, batch, centroids, stage, step)


METHOD.losses = losses
"""
"""Added to a method: its second step fails once, and the run goes on."""


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_docs_page_shows_each_example_as_it_is(example: Path) -> None:
    shown = [
        block
        for page in (REPOSITORY / "docs").glob("*.md")
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert example.read_text() in shown, f"no page of docs/ shows {example.name} as it is"


def write_folders(folder: Path, studies: int) -> None:
    """A corpus in the layout that ``folders_reader.py`` reads."""
    phantom = PhantomCorpus(studies, seed=1, height=72, width=72)
    for i in range(studies):
        place = folder / f"study{i:03d}"
        place.mkdir(parents=True)
        Image.fromarray(phantom.render(i)).save(place / "film.png")
        (place / "report.txt").write_text(phantom.study(i).report)


@pytest.mark.ray
def test_a_method_a_backbone_and_a_reader_in_files_train_and_a_task_in_a_file_evaluates(
    ray_head: RayHead, local_ray: None, tmp_path: Path
) -> None:
    write_folders(tmp_path / "corpus", 60)
    plugins = tmp_path / "plugins"
    shutil.copytree(EXAMPLES, plugins)
    with (plugins / "hardest_negative.py").open("a") as file:
        file.write(FAILS_ONCE)
    trained = Job(
        tmp_path, f"--data.uri={tmp_path / 'corpus'}", *SHORT,
        f"--data.format={plugins / 'folders_reader.py'}", f"--model.image_encoder={plugins / 'patchify.py'}",
        f"--method.name={plugins / 'hardest_negative.py'}", "--run.name=own",
        env=ray_head.environment,
    )  # fmt: skip
    said = trained.wait()
    assert trained.process.returncode == 0, said[-3000:]
    run = tmp_path / "own"
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert said.count("the workers are started again: rank 0 failed: RuntimeError: an error that passes") == 1
    assert not any("centroids_version" in row for row in rows(run))
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["name"] == str(plugins / "hardest_negative.py")
    assert "layers.0.weight" in load_file(run / "export" / "image_encoder" / "model.safetensors")
    task = plugins / "alignment_task.py"
    files = [str(plugins / f"{name}.py") for name in ("hardest_negative", "patchify", "folders_reader")]
    with pytest.raises(
        UserError, match=r"hardest_negative.py \(method.name\), which would be executed here.*evaluate.trusted"
    ):
        open_run("evaluate.run", str(run), trusted=files[1:])
    measured = run_here(
        tmp_path, "evaluate", f"--run.storage={tmp_path}", f"--evaluate.run={run}", f"--evaluate.tasks=[retrieval, {task}]",
        f"--evaluate.trusted=[{', '.join(files)}]",
        f"--evaluate.options={{{task}: {{scale: 2.0}}}}", "--evaluate.resamples=100", "--run.name=measured",
        "--evaluate.cpus_per_worker=0.5", "--evaluate.beside=[]",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stdout + measured.stderr
    scores = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["scores"]
    own = [score for score in scores if score["task"] == str(task)]
    assert {score["encoder"] for score in own} == {"pretrained"}
    assert all(score["metric"] == "gap" and score["number"] > 0 for score in own)


def test_a_clusterer_in_a_file_clusters_the_bank() -> None:
    rows_ND = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    rows = RowArray(rows_ND, np.arange(2000), numpy_assign)
    config = ClusteringConfig(clusterer=str(EXAMPLES / "minibatch_clusterer.py"))
    found = recluster(rows, RefreshRequest(1, 10, 0, 2000, 6, None), config)
    expected = kmeans(rows, farthest_point_seeds(rows, 6), config.iterations, config.tolerance, batch_rows=512)
    assert found.rows_KD is not None
    assert np.array_equal(found.rows_KD, expected.centroids_KD)
    plain = recluster(rows, RefreshRequest(1, 10, 0, 2000, 6, None), ClusteringConfig())
    assert not np.array_equal(found.rows_KD, plain.rows_KD)
