"""The library on a finished `make pretrain`: its numbers are those of the evaluation, from the run, from an export in a bucket,
and from the wheel in an environment with the light core alone. And a trained CLIP in plain transformers.
"""

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import cmcgns
from cmcgns.commands import main
from cmcgns.data.reports import parse_report
from cmcgns.evaluate.sentence_truth import sentence_truth
from cmcgns.library.films import read_square
from cmcgns.library.runs import open_run
from cmcgns.phantom import FINDINGS
from tests.jobs import REPOSITORY, Job
from tests.library.test_agreement import Films, value
from tests.s3 import S3Server

pytestmark = pytest.mark.ray

SHOWN = 64
USE = f"""
import json, resource, sys, time
import numpy as np
where, asked, out = sys.argv[1:]
films, looked_at, reports = json.loads(open(asked).read())
clock = [time.perf_counter()]
import cmcgns
clock.append(time.perf_counter())
model = cmcgns.load(where)
clock.append(time.perf_counter())
film_rows, text_rows = model.embed_films(films[:{SHOWN}]), model.embed_reports(reports[:{SHOWN}])
clock.append(time.perf_counter())
scores = model.zero_shot(films, "phantom")
heats = [model.heatmap(film, report) for film, report in zip(looked_at, reports, strict=True)]
clock.append(time.perf_counter())
assert not {{"ray", "deepspeed", "faiss"}} & set(sys.modules)
np.savez(out, film_rows=film_rows, text_rows=text_rows, **scores)
points = [[heat.sentences, heat.weight_Sgg.reshape(len(heat.sentences), -1).argmax(1).tolist()] for heat in heats]
took = dict(zip(("import cmcgns", "load", "embed", "zero-shot and heat maps"), np.diff(clock).round(3).tolist()))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"points": points, "took": took, "memory": memory, "package": cmcgns.__file__}}))
"""
"""What a user writes, around it what the test has to know."""


@dataclass(frozen=True)
class Finished:
    """A finished run and its evaluation, with the films and reports of its test split as files."""

    run: Path
    scores: pd.DataFrame
    films: Films
    asked: Path
    """A JSON file: the first film of each study, the film that the evaluation looks at, and the report."""

    @cached_property
    def covered(self) -> list[np.ndarray]:
        """Share of each patch that each finding covers, (K, P), of each study."""
        return [self.films.coverage(number, self.films.shown(study)) for number, study in self.films.studies]


def finish(storage: Path, script: str, *settings: str) -> None:
    """Run a job with its default config to its end."""
    began, job = time.monotonic(), Job(storage / "runs", *settings, config=None, job=script)
    said = job.wait(1800)
    assert job.process.returncode == 0, said[-3000:]
    print(f"{script}: {time.monotonic() - began:.0f} s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    storage = tmp_path_factory.mktemp("library")
    finish(storage, "jobs/pretrain.py", "--run.name=p")
    finish(
        storage, "jobs/evaluate.py", f"--evaluate.run={storage}/runs/p", "--evaluate.tasks=[zeroshot, grounding]",
        "--run.name=e", "--evaluate.beside=[]", "--evaluate.resamples=100",
    )  # fmt: skip
    evaluation = json.loads((storage / "runs" / "e" / "evaluation.json").read_text())
    films = Films(open_run("run", f"{storage}/runs/p").config)
    return Finished(
        storage / "runs" / "p", pd.DataFrame(evaluation["scores"]), films, written(films, storage / "films")
    )


def written(films: Films, folder: Path) -> Path:
    """The request of ``USE``, with each film as PNG."""
    folder.mkdir()

    def film_file(number: int, film: int) -> str:
        path = folder / f"{number}-{film}.png"
        Image.fromarray(films.corpus.render(number, film)).save(path)
        return str(path)

    first = [film_file(number, 0) for number, _ in films.studies]
    looked_at = [film_file(number, films.shown(study)) for number, study in films.studies]
    asked = folder / "asked.json"
    asked.write_text(json.dumps([first, looked_at, [study.report for _, study in films.studies]]))
    return asked


@dataclass(frozen=True)
class Used:
    """What ``USE`` has found."""

    arrays: dict[str, np.ndarray]
    points: list[tuple[list[str], list[int]]]
    package: str


def use(finished: Finished, where: str, out: Path, python: Sequence[str], environment: dict[str, str]) -> Used:
    """Run ``USE`` on the model at ``where`` in a process of its own."""
    done = subprocess.run(
        [*python, "-P", "-c", USE, where, str(finished.asked), str(out)], capture_output=True, text=True, check=False,
        env=environment | {"OMP_NUM_THREADS": "1"}, cwd=out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    kind = "the wheel" if "site-packages" in found["package"] else "the sources"
    of = "the export in a bucket" if where.startswith("s3://") else "the run"
    print(f"{kind} on {of}: {found['took']} s, {found['memory']:.0f} MiB at most")
    return Used(dict(np.load(out)), found["points"], found["package"])


def check(finished: Finished, used: Used) -> None:
    """Shapes, zero-shot AUC and the pointing of heat maps are those of the evaluation."""
    for rows in (used.arrays["film_rows"], used.arrays["text_rows"]):
        assert rows.shape == (SHOWN, 128)
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    gaps = [abs(auc - value(finished.scores, "zeroshot", f"AUC: {name}")) for name, auc in aucs(finished, used).items()]
    assert len(gaps) == len(FINDINGS)
    pointing = pointing_of(finished, used)
    expected = value(finished.scores, "grounding", "pointing game")
    print(
        f"{len(finished.films.studies)} test studies: AUC of {len(gaps)} findings at most {max(gaps):.1e} from the evaluation's, "
        f"pointing game {pointing:.6f}, evaluated {expected:.6f}"
    )
    assert max(gaps) < 1e-6
    assert abs(pointing - expected) < 1e-6


def aucs(finished: Finished, used: Used) -> dict[str, float]:
    studies = [study for _, study in finished.films.studies]
    truth = {name: [study.labels[name] for study in studies] for name in FINDINGS}
    return {
        name: float(roc_auc_score(truth[name], used.arrays[name]))
        for name in FINDINGS
        if 0 < sum(truth[name]) < len(studies)
    }


def pointing_of(finished: Finished, used: Used) -> float:
    """Share of the sentences that state a visible finding whose hottest patch it covers."""
    hits = list[bool]()
    for covered_KP, (sentences, hottest) in zip(finished.covered, used.points, strict=True):
        for sentence, patch in zip(sentences, hottest, strict=True):
            truth = sentence_truth(sentence)
            if truth is None or truth.negated or truth.finding not in FINDINGS:
                continue
            covered_P = covered_KP[FINDINGS.index(truth.finding)]
            if covered_P.any():
                hits.append(bool(covered_P[patch] > 0))
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def used(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Used:
    """From the run, with what is installed here."""
    out = tmp_path_factory.mktemp("used") / "found.npz"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return use(finished, str(finished.run), out, [sys.executable], environment)


def test_ten_lines_without_ray_give_the_numbers_of_the_evaluation(finished: Finished, used: Used) -> None:
    check(finished, used)


@pytest.fixture(scope="module")
def bucket_export(finished: Finished, s3_server: S3Server) -> str:
    """The export of the run, with its model card, in a bucket."""
    uri = f"{s3_server.make_bucket('library')}/models/p"
    assert main(["export", str(finished.run), uri, f"--evaluation={finished.run.parent / 'e'}"]) == 0
    return uri


@pytest.mark.s3
def test_an_export_in_a_bucket_gives_them_too(
    finished: Finished, used: Used, bucket_export: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = use(finished, bucket_export, tmp_path / "found.npz", [sys.executable], environment)
    check(finished, found)
    assert all(np.array_equal(rows, used.arrays[name]) for name, rows in found.arrays.items())


@pytest.mark.s3
def test_the_wheel_with_the_light_core_alone_gives_them_too(
    finished: Finished, bucket_export: str, tmp_path: Path
) -> None:
    """Built by `python -m build` and installed into an empty environment, with the constraints of this repository."""
    python = tmp_path / "venv" / "bin" / "python"
    began = time.monotonic()
    venv.create(tmp_path / "venv", with_pip=True)
    run_pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command(*run_pip, "build")
    command(str(python), "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(copied(tmp_path / "source")))
    (wheel,) = (tmp_path / "dist").glob("cmcgns-*.whl")
    print(f"wheel: {wheel.stat().st_size / 2**10:.0f} KiB, built in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    command(*run_pip, "-c", str(pins(tmp_path / "pins.txt")), str(wheel))
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    print(f"installed with its dependencies in {time.monotonic() - began:.0f} s: {mebibytes(site):.0f} MiB")
    assert not any((site / name).exists() for name in ("ray", "deepspeed", "faiss", "pandas", "sklearn"))
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name in ("PATH", "LANG")}
    for where in (bucket_export, str(finished.run)):
        found = use(finished, where, tmp_path / "found.npz", [str(python)], kept)
        assert found.package.startswith(str(site))
        check(finished, found)


PLAIN = """
import sys
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
where, pixels, texts, out = sys.argv[1:]
model, tokenizer = AutoModel.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
with torch.no_grad():
    tokens = tokenizer(np.load(texts).tolist(), padding=True, return_tensors="pt")
    rows = [model.get_text_features(**tokens), model.get_image_features(pixel_values=torch.from_numpy(np.load(pixels)))]
assert "cmcgns" not in sys.modules
np.savez(out, *(torch.nn.functional.normalize(row.pooler_output, dim=-1).numpy() for row in rows))
"""


def test_a_trained_clip_gives_its_embeddings_in_plain_transformers(finished: Finished, tmp_path: Path) -> None:
    """In a process that has no cmcgns: the same films as pixels, and each sentence of their reports as a text."""
    job = Job(
        tmp_path / "runs", "--run.name=clip", "--model.image_encoder=vit-tiny-8", "--objective.text_pooling=cls",
        "--train.stage1_steps=60", "--data.phantom_studies=1500", config=REPOSITORY / "jobs" / "configs" / "phantom-clip.yaml",
    )  # fmt: skip
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert main(["export", f"{tmp_path}/runs/clip", f"{tmp_path}/out", "--transformers"]) == 0
    model, (films, _, reports) = cmcgns.load(tmp_path / "out"), json.loads(finished.asked.read_text())
    seen = [model.seen(read_square(film, model.config.data)) for film in films[:SHOWN]]
    np.save(tmp_path / "pixels.npy", np.repeat(np.stack(seen)[:, None] / np.float32(127.5) - 1, 3, axis=1))
    every = sorted({f"{sentence.capitalize()}." for report in reports for sentence in parse_report(report).sentences})
    texts = every[:: len(every) // SHOWN][:SHOWN]
    np.save(tmp_path / "texts.npy", texts)
    command(
        sys.executable,
        "-P",
        "-c",
        PLAIN,
        *(f"{tmp_path}/{name}" for name in ("out", "pixels.npy", "texts.npy", "found.npz")),
    )
    found = np.load(tmp_path / "found.npz")
    gaps = {
        name: float(np.abs(found[array] - ours).max())
        for name, array, ours in (
            ("texts", "arr_0", model.embed_reports(texts)), ("films", "arr_1", model.embed_films(films[:SHOWN]))
        )
    }  # fmt: skip
    print(f"plain transformers, {SHOWN} films and texts, largest difference to our embeddings: {gaps}")
    assert max(gaps.values()) <= 1e-6


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def copied(folder: Path) -> Path:
    """The files that git knows: building leaves others beside the sources."""
    archive = subprocess.run(
        ["git", "ls-files", "-z", "--", "cmcgns", "pyproject.toml", "README.md", "LICENSE"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, archive.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


def pins(path: Path) -> Path:
    """The versions of constraints/cpu.txt, without their hashes, as pip takes them for constraints."""
    lines = (REPOSITORY / "constraints" / "cpu.txt").read_text().splitlines()
    path.write_text("".join(f"{line.rstrip(' ' + chr(92))}\n" for line in lines if line[:1].isalnum()))
    return path


def mebibytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
