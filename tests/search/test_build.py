"""The build of an index on Ray: killed and continued, it holds what the library finds, and retrieves as the evaluation does."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from cmcgns import load_index
from cmcgns.data.order import VALIDATION_EPOCH, Arrangement, drawn_image, one_after_the_other
from cmcgns.evaluate.tasks.retrieval import retrieval
from cmcgns.library.model import Model
from cmcgns.models.retrieval import DEPTHS
from cmcgns.phantom import PhantomCorpus
from cmcgns.search.build import build_index
from cmcgns.search.config import SearchConfig, SearchJobConfig
from cmcgns.search.index import Index
from cmcgns.search.shard import in_shards, shard_bounds
from cmcgns.storage.integrity import hash_file
from tests.jobs import REPOSITORY, Running, run_here
from tests.ray_head import RayHead
from tests.search.made import make_index

SHARD = 2


def studies_of(films_of_each: list[int]) -> pa.Table:
    return pa.table({"study_id": [f"s{number}" for number, films in enumerate(films_of_each) for _ in range(films)]})


@pytest.mark.parametrize(
    ("films_of_each", "bounds"),
    [
        ([1] * 10, [0, 4, 8, 10]),
        ([1, 1, 1, 2, 1, 3, 1], [0, 5, 9, 10]),  # no study is cut
        ([9], [0, 9]),
        ([2, 2], [0, 4]),
        ([1, 9, 1], [0, 10, 11]),
        ([4, 4], [0, 4, 8]),
    ],
)
def test_a_shard_ends_with_a_study(films_of_each: list[int], bounds: list[int]) -> None:
    assert shard_bounds(studies_of(films_of_each), 4) == bounds


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_rows_go_to_the_shard_of_their_position_whatever_is_missing_and_however_they_come(size: int) -> None:
    bounds = [0, 4, 8, 9, 20, 23]
    positions = [1, 2, 3, 4, 6, 7, 20, 22]  # none of shards 2 and 3
    table = pa.table({"position": positions})
    blocks = [table.slice(start, size) for start in range(0, len(positions), size)] + [table.slice(0, 0)]
    found, ended = dict[int, list[int]](), list[int]()
    for number, rows in in_shards(blocks, bounds):
        assert number not in ended
        if rows is None:
            ended.append(number)
        else:
            found.setdefault(number, []).extend(rows["position"].to_pylist())
    assert found == {0: [1, 2, 3], 1: [4, 6, 7], 4: [20, 22]}
    assert ended == [0, 1, 2, 3, 4]


def test_splits_in_a_row_share_no_window() -> None:
    """Groups of 3, 1 and 2 in windows of two: windows start anew with each split."""
    parts = [
        Arrangement(np.arange(3), np.array(groups, np.int32), len(set(groups)))
        for groups in ([0, 1, 2], [0, 0, 0], [0, 1, 1])
    ]
    whole = one_after_the_other(parts, 2)
    assert whole.group_S.tolist() == [0, 1, 2, 4, 4, 4, 6, 7, 7]
    assert whole.epoch(0, -1, 2).starts.tolist() == [0, 2, 3, 6, 9]


def recall_of(index: Index, paths: list[str], depth: int) -> dict[str, float]:
    """Duplicate-aware recall among the films at ``paths`` and their reports: a hit is any item with the words of the query's
    report among the ``depth`` nearest."""
    rows = index.rows.to_pylist()
    row_of = {row["path"]: number for number, row in enumerate(rows)}
    report_of = {
        rows[row]["study_id"]: number for number, row in enumerate(np.flatnonzero(index.rows["first"].to_numpy()))
    }
    shown = [row_of[path] for path in paths]
    image_ND = np.concatenate(list(index.films.vectors()))[shown]
    report_ND = np.concatenate(list(index.reports.vectors()))[[report_of[rows[row]["study_id"]] for row in shown]]
    words = [rows[row]["report_hash"] for row in shown]
    found = {}
    for way, query_ND, item_ND in (("i2t", image_ND, report_ND), ("t2i", report_ND, image_ND)):
        nearest_Nk = np.argsort(-(query_ND @ item_ND.T), axis=1, kind="stable")[:, :depth].tolist()
        hits = [wanted in [words[item] for item in items] for items, wanted in zip(nearest_Nk, words, strict=True)]
        found[f"{way}_recall_at_{depth}"] = float(np.mean(hits))
    return found


def drawn_films(index: Index, split: str, seed: int) -> list[str]:
    """Paths of the films that the evaluation draws, one of each study of a split."""
    of_study = dict[str, list[str]]()
    for row in index.rows.to_pylist():
        if row["split"] == split:
            of_study.setdefault(row["study_id"], []).append(row["path"])
    return [paths[drawn_image(seed, VALIDATION_EPOCH, study, len(paths))] for study, paths in of_study.items()]


def test_a_finished_build_that_is_repeated_says_so_and_how_to_query(run: Path, model: Model, tmp_path: Path) -> None:
    folder, text = make_index(tmp_path / "index", model), io.StringIO()
    before = (folder / "index.json").read_bytes()
    config = SearchJobConfig(search=SearchConfig(run=str(run), index=str(folder)))
    assert build_index(config, Console(file=text, width=200, soft_wrap=True)) == 0
    assert "before; nothing was built" in text.getvalue()
    assert f"--search.index={folder} --search.text=" in text.getvalue()
    assert (folder / "index.json").read_bytes() == before


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_build_that_is_killed_continues_and_retrieves_as_the_evaluation_does(
    run: Path, model: Model, ray_head: RayHead, tmp_path: Path
) -> None:
    data = model.config.data
    corpus = PhantomCorpus(data.phantom_studies, data.seed, data.phantom_size, data.phantom_size)
    settings = [
        f"--search.run={run}", "--search.index=index", f"--search.shard_films={SHARD}", "--search.cpus_per_worker=0.5",
        "--search.batch_size=2",
    ]  # fmt: skip
    folder = tmp_path / "index"
    script = [sys.executable, str(REPOSITORY / "jobs" / "search.py"), *settings]
    job = Running(
        tmp_path / "log", script, env=ray_head.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path
    )
    job.wait_for(lambda: (folder / "shard-00000.json").exists())
    job.kill()
    made = sorted(folder.glob("shard-*.json"))
    assert not (folder / "index.json").exists(), "it was killed too late"
    before = {
        path: (path.stat().st_mtime_ns, hash_file(path))
        for path in folder.glob("shard-00000.*")
        if path.suffix != ".json"
    }
    assert len(before) == 4
    done = run_here(tmp_path, "search", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(made)} of " in done.stdout
    assert before == {path: (path.stat().st_mtime_ns, hash_file(path)) for path in before}

    index = load_index(folder, model)
    films = [(number, film) for number in range(corpus.studies) for film in range(len(corpus.study(number).films))]
    assert len(index.films) == len(films) > len(index.reports) == corpus.studies
    place = {row["path"]: number for number, row in enumerate(index.rows.to_pylist())}
    some = films[::9]
    rows = [place[f"{number}/{film}"] for number, film in some]
    pixels = [corpus.render(*film) for film in some]
    np.testing.assert_allclose(np.concatenate(list(index.films.vectors()))[rows], model.embed_films(pixels), atol=1e-5)
    for row, (number, _), square_RR in zip(rows, some, model._squares(pixels), strict=True):
        (case,) = index.nearest(np.concatenate(list(index.films.vectors()))[[row]], 1)[0].films
        assert case.study_id == corpus.study(number).study_id
        assert np.array_equal(index.picture(case), square_RR)

    measured = retrieval(str(run), "test")
    paths = drawn_films(index, "test", data.seed)
    assert measured["studies"] == len(paths)
    for depth in DEPTHS:
        for name, value in recall_of(index, paths, depth).items():
            assert value == pytest.approx(measured[name], abs=1e-6), name

    again = run_here(tmp_path, "search", *settings)
    assert (again.returncode, "before; nothing was built" in again.stdout) == (0, True)
    for change, told in (
        ("--search.shard_films=17", f"search.shard_films was {SHARD} in run index and cannot become 17"),
        ("--search.uri=phantom:120", "was begun with other films than phantom has now"),
    ):
        refused = run_here(tmp_path, "search", *settings, change)
        assert (refused.returncode, told in refused.stderr) == (2, True), refused.stderr
    refused = run_here(tmp_path, "search", f"--search.run={run}", f"--search.index={run}")
    assert "is the folder of another job" in refused.stderr
    assert json.loads((folder / "index.json").read_text())["bad_rows"] == 0
