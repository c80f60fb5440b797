"""A finished pretraining run: the library's numbers are those of its evaluation, from the run, its export and S3."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import cmcgns
from cmcgns.config import Config
from cmcgns.data.labelled import phantom_set
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.readers import PhantomSource
from cmcgns.evaluate.films import center_crop, patch_coverage, resize_masks
from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.library.model import Model
from cmcgns.phantom import FINDINGS, PhantomCorpus
from tests.jobs import TINY, run_here
from tests.s3 import S3Server

SHORT = (
    "--train.stage1_steps=8", "--train.stage2_steps=2", "--train.warmup_steps=1", "--train.num_workers=1",
    "--train.engine=torch", "--train.zero_stage=0", "--train.threads_per_worker=1", "--clustering.actors=1",
    "--objective.local_negatives=films", "--model.image_encoder=resnet-tiny-16", "--data.phantom_studies=300",
)  # fmt: skip
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A finished run `p`, and its evaluation `e`."""
    folder = tmp_path_factory.mktemp("agreement")
    trained = run_here(folder, "pretrain", "--config", str(TINY), *SHORT, "--run.name=p")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    measured = run_here(
        folder, "evaluate", "--evaluate.run=runs/p", "--run.name=e", "--evaluate.beside=[]", "--evaluate.resamples=100",
        "--evaluate.tasks=[zeroshot, grounding, retrieval]", "--evaluate.cpus_per_worker=0.5",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stdout + measured.stderr
    return folder / "runs"


@pytest.fixture(scope="module")
def scores(folder: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads((folder / "e" / "evaluation.json").read_text())["scores"])


class Films:
    """The phantom behind a run: films as arrays, reports and truth of its test studies."""

    def __init__(self, config: Config) -> None:
        data = config.data
        self.config, self.source = config, PhantomSource(data.phantom_studies, 0, data.phantom_size, data.phantom_size)
        self.images = phantom_set(self.source)
        self.corpus = PhantomCorpus(data.phantom_studies, 0, data.phantom_size, data.phantom_size)
        every = enumerate(map(self.corpus.study, range(data.phantom_studies)))
        self.studies = [(number, study) for number, study in every if study.split == "test"]

    def shown(self, study: Any) -> int:
        """The film of a study that retrieval and grounding see."""
        return drawn_image(self.config.data.seed, VALIDATION_EPOCH, study.study_id, len(study.films))

    def coverage(self, number: int, film: int) -> np.ndarray:
        """Share of each patch that each finding covers, (K, P)."""
        path = f"{number}/{film}"
        read = self.source.read_image(path)
        mask_KHW = self.images.annotations({"path": path, "boxes": None, "masks": None}, read).mask_KHW
        data = self.config.data
        return patch_coverage(center_crop(resize_masks(mask_KHW, data.resize), data.image_size), data.image_size // 16)


def value(scores: pd.DataFrame, task: str, metric: str, setting: str | None = None) -> float:
    rows = scores[(scores["task"] == task) & (scores["metric"] == metric)]
    rows = rows if setting is None else rows[rows["setting"] == setting]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def zero_shot_aucs(model: Model, films: Films) -> dict[str, float]:
    """AUC of each finding that some test films have and some do not: the first film of each study."""
    pixels = [films.corpus.render(number, 0) for number, _ in films.studies]
    found = model.zero_shot(pixels, "phantom")
    truth = {name: [study.labels[name] for _, study in films.studies] for name in FINDINGS}
    return {
        name: float(roc_auc_score(truth[name], found[name])) for name in FINDINGS if 0 < sum(truth[name]) < len(pixels)
    }


def test_zero_shot_auc_from_run_export_and_bucket_is_that_of_the_evaluation(
    folder: Path, scores: pd.DataFrame, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder / "p" / "export", tmp_path / "given"))
    for where in (folder / "p", folder / "p" / "export", copied):
        model = cmcgns.load(str(where))
        films = Films(model.config)
        aucs = zero_shot_aucs(model, films)
        assert len(aucs) >= 4
        for name, auc in aucs.items():
            assert auc == pytest.approx(value(scores, "zeroshot", f"AUC: {name}"), abs=1e-6)


def test_the_pointing_of_heat_maps_is_that_of_the_evaluation(folder: Path, scores: pd.DataFrame) -> None:
    model = cmcgns.load(str(folder / "p"))
    films, hits = Films(model.config), list[bool]()
    for number, study in films.studies:
        film = films.shown(study)
        covered_KP = films.coverage(number, film)
        found = model.heatmap(films.corpus.render(number, film), study.report)
        for sentence, weight_gg in zip(found.sentences, found.weight_Sgg, strict=True):
            truth = sentence_truth(sentence)
            if truth is None or truth.negated or truth.finding not in FINDINGS:
                continue
            covered_P = covered_KP[FINDINGS.index(truth.finding)]
            if covered_P.any():
                hits.append(bool(covered_P[weight_gg.argmax()] > 0))
    assert len(hits) > 20
    assert np.mean(hits) == pytest.approx(value(scores, "grounding", "pointing game"), abs=1e-6)


def test_recall_by_similarity_is_that_of_the_evaluation_in_every_way(folder: Path, scores: pd.DataFrame) -> None:
    model = cmcgns.load(str(folder / "p"))
    films = Films(model.config)
    reports = [study.report for _, study in films.studies]
    pixels = [films.corpus.render(number, films.shown(study)) for number, study in films.studies]
    words = [tuple(model._read([report])[0][0].sentences) for report in reports]
    right_NN = np.array([[one == other for other in words] for one in words])
    for by, setting in (("global", ""), ("parts", ", by parts"), ("both", ", combined")):
        score_NT = model.similarity(pixels, reports, by)  # type: ignore[arg-type]
        for way, table, expected in (
            ("film to report", score_NT, right_NN),
            ("report to film", score_NT.T, right_NN.T),
        ):
            best = np.argsort(-table, axis=1)[:, :5]
            recall = np.take_along_axis(expected, best, axis=1).any(1).mean()
            assert recall == pytest.approx(value(scores, "retrieval", "recall@5", way + setting), abs=1e-6), (by, way)


@pytest.mark.s3
def test_a_run_and_films_in_a_bucket_are_used_as_local_ones(folder: Path, s3_server: S3Server, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket("library")
    s3_server.upload(folder / "p", f"{bucket}/runs/p")
    model, here = cmcgns.load(f"{bucket}/runs/p"), cmcgns.load(str(folder / "p"))
    films = Films(here.config)
    rendered = films.corpus.render(films.studies[0][0], 0)
    s3_server.upload(save_film(tmp_path, rendered), f"{bucket}/films")
    assert np.array_equal(model.embed_films([f"{bucket}/films/film.png"]), here.embed_films([rendered]))
    assert np.array_equal(cmcgns.load(f"{bucket}/runs/p/export").embed_films([rendered]), here.embed_films([rendered]))
    with pytest.raises(cmcgns.UserError, match=r"film 0 \(s3://library/films/none.png\) is not a file"):
        model.embed_films([f"{bucket}/films/none.png"])
    with pytest.raises(cmcgns.UserError, match=r"s3://library/none does not exist"):
        cmcgns.load(f"{bucket}/none")


def save_film(folder: Path, film_HW: np.ndarray) -> Path:
    """A folder with the film as PNG."""
    from PIL import Image

    (folder / "films").mkdir()
    Image.fromarray(film_HW).save(folder / "films" / "film.png")
    return folder / "films"
