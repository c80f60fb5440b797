"""An index in use: what it finds, and that nothing in it is believed before it is verified."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import cmcgns
from cmcgns import UserError, load_index
from cmcgns.library.model import Model
from cmcgns.search.index import Index
from cmcgns.search.manifest import FILMS as FILMS_FILE
from cmcgns.search.manifest import PICTURES, ROWS, read_manifest, shard_file
from cmcgns.search.manifest import REPORTS as REPORTS_FILE
from tests.docs.test_pages import python_blocks
from tests.evaluate.test_embed_job import write_run
from tests.jobs import REPOSITORY
from tests.library.conftest import CONFIG
from tests.library.core import WITHOUT_EXTRAS
from tests.library.test_model import png
from tests.s3 import S3Server
from tests.search.made import FILMS, FIRST, PHANTOM, PIXELS, REPORTS, make_index


def test_films_and_texts_find_the_films_and_reports_that_are_nearest_by_the_library(index: Index, model: Model) -> None:
    films_ND, reports_ND = model.embed_films(PIXELS), model.embed_reports(REPORTS)
    of_studies = np.flatnonzero(FIRST)
    assert len(of_studies) < len(FILMS)  # some studies have two films and one report
    queries = [PIXELS[8][:, ::-1].copy(), PIXELS[3]]
    texts = ["There is a left pleural effusion.", REPORTS[5]]
    for found, query_QD in (
        (index.search(films=queries, k=6), model.embed_films(queries)),
        (index.search(texts=texts, k=6), model.embed_reports(texts)),
    ):
        for one, query_D in zip(found, query_QD, strict=True):
            films = np.argsort(-(films_ND @ query_D), kind="stable")[:6]
            reports = of_studies[np.argsort(-(reports_ND[of_studies] @ query_D), kind="stable")[:6]]
            for cases, rows, cosine_N in (
                (one.films, films, films_ND @ query_D),
                (one.reports, reports, reports_ND @ query_D),
            ):
                np.testing.assert_allclose([case.cosine for case in cases], cosine_N[rows], atol=1e-5)
                assert [case.path for case in cases] == [f"{FILMS[row][0]}/{FILMS[row][1]}" for row in rows]
                assert [case.study_id for case in cases] == [PHANTOM.study(FILMS[row][0]).study_id for row in rows]


def test_a_film_of_the_index_finds_itself_with_its_report_and_its_picture(index: Index, model: Model) -> None:
    (found,) = index.search(films=[PIXELS[11]], k=1)
    (case,) = found.films
    assert case.cosine == pytest.approx(1, abs=1e-5)
    parsed, encoded = model._read([REPORTS[11]])[0]
    assert case.sentences == parsed.sentences[: encoded.sentences]  # what the model has read of it
    picture = index.picture(case)
    assert picture is not None
    assert np.array_equal(picture, next(model._squares([PIXELS[11]])))


def test_more_cases_than_there_are_give_all_of_them_once(index: Index) -> None:
    (found,) = index.search(texts=["no pneumothorax"], k=1000)
    assert sorted(case.row for case in found.films) == [*range(len(FILMS))]
    assert sorted(case.row for case in found.reports) == np.flatnonzero(FIRST).tolist()


def test_shards_and_kinds_find_the_same(model: Model, index: Index, tmp_path: Path) -> None:
    """One shard, inverted lists that are all looked into, and no pictures."""
    one = load_index(make_index(tmp_path / "one", model, bounds=[0], pictures=False), model)
    lists = load_index(make_index(tmp_path / "ivf", model, "ivf"), model)
    lists.films.share = lists.reports.share = 1.0
    assert set(lists.manifest.recall_at_10) == set(lists.manifest.recall_at_10["films"]) == {"films", "reports"}
    for other in (one, lists):
        for mine, its in zip(index.search(films=PIXELS[:4]), other.search(films=PIXELS[:4]), strict=True):
            assert [case.row for case in mine.films] == [case.row for case in its.films]
            assert [case.row for case in mine.reports] == [case.row for case in its.reports]
    assert one.picture(one.search(films=PIXELS[:1])[0].films[0]) is None


def test_an_index_of_another_model_is_refused_by_both_names(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "other", CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"max_tokens": 60})}))
    for other in (tmp_path / "other", cmcgns.load(tmp_path / "other")):
        with pytest.raises(UserError, match=f"was built by {run} .* and {tmp_path}/other is another model"):
            load_index(folder, other)
    shutil.copytree(run / "export", tmp_path / "moved")
    assert len(load_index(folder, tmp_path / "moved").films) == len(FILMS)
    assert json.loads((folder / "index.json").read_text())["model"]["uri"] == str(run)


@pytest.mark.parametrize("key", ["resize", "image_size", "crop_borders", "max_tokens", "max_sentences"])
def test_the_same_weights_that_read_films_or_reports_otherwise_are_another_model(
    key: str, folder: Path, run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "other")
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    was = settings["data"][key]
    settings["data"][key] = not was if isinstance(was, bool) else {"resize": 64, "image_size": 32}.get(key, 12)
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="is another model"):
        load_index(folder, copied)


def test_a_run_that_was_moved_has_to_be_named(folder: Path, run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "index")
    moved = replace(
        read_manifest(str(folder)), model=read_manifest(str(folder)).model | {"uri": str(tmp_path / "gone")}
    )
    (copied / "index.json").write_bytes(moved.to_json())
    with pytest.raises(UserError, match=f"was built by {tmp_path}/gone, which is not there any more; .*model="):
        load_index(copied)
    assert len(load_index(copied, run).films) == len(FILMS)


def flip(path: Path, place: float = 0.5) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", [FILMS_FILE, REPORTS_FILE, ROWS])
@pytest.mark.parametrize(("harm", "told"), [(flip, "is not what was written"), (Path.unlink, "is missing")])
def test_a_changed_or_missing_file_of_a_shard_is_refused_by_name(
    name: str, harm: Callable[[Path], None], told: str, folder: Path, model: Model, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "index")
    harm(copied / shard_file(1, name))
    with pytest.raises(UserError, match=f"index {copied}: {shard_file(1, name)} {told}"):
        load_index(copied, model)


def test_a_changed_picture_is_refused_when_it_is_read_and_a_missing_file_of_them_at_once(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "index")
    for place in (0.2, 0.5, 0.8):
        flip(copied / shard_file(0, PICTURES), place)
    index = load_index(copied, model)
    cases = {case.row: case for case in index.search(texts=["no pneumothorax"], k=1000)[0].films}
    refused = 0
    for row in range(10):
        try:
            assert index.picture(cases[row]) is not None
        except UserError as error:
            refused += 1
            assert f"a picture in {shard_file(0, PICTURES)} is not what was written" in str(error)  # noqa: PT017
    assert refused >= 1
    assert index.picture(cases[12]) is not None  # of another shard
    (copied / shard_file(2, PICTURES)).unlink()
    with pytest.raises(UserError, match=f"{shard_file(2, PICTURES)} is missing"):
        load_index(copied, model)


def test_a_description_that_was_changed_or_is_not_there_is_refused(folder: Path, model: Model, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "index")
    described = copied / "index.json"
    text = described.read_text()
    for old, new, told in (
        ('"kind": "flat"', '"kind": "ivf"', "is not what was written"),
        ('"version": 1', '"version": 2', "has version 2, this code reads version 1"),
        ("{", "", "is not a description of an index"),
        ('"dim"', '"dum"', "is not what was written"),
    ):
        described.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=told):
            load_index(copied, model)
    described.unlink()
    with pytest.raises(UserError, match=r"has no index\.json"):
        load_index(copied, model)
    (copied / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="is an incomplete index; repeat the command"):
        load_index(copied, model)


def test_files_of_two_indexes_do_not_make_one(folder: Path, model: Model, tmp_path: Path) -> None:
    """Hashes that fit, of files that do not."""
    copied = shutil.copytree(folder, tmp_path / "index")
    manifest = read_manifest(str(folder))
    for number, other in ((0, 2), (2, 0)):
        shutil.copy(folder / shard_file(number, REPORTS_FILE), copied / shard_file(other, REPORTS_FILE))
        manifest.shards[other].hashes[REPORTS_FILE] = read_manifest(str(folder)).shards[number].hashes[REPORTS_FILE]
    assert manifest.shards[0].reports != manifest.shards[2].reports
    (copied / "index.json").write_bytes(manifest.to_json())
    with pytest.raises(UserError, match="its files do not belong together"):
        load_index(copied, model)


@pytest.mark.s3
def test_an_index_in_a_bucket_answers_as_a_local_one(index: Index, model: Model, s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket("searched")
    make_index(f"{bucket}/index", model)
    there = load_index(f"{bucket}/index", model)
    mine, its = index.search(films=PIXELS[:3]), there.search(films=PIXELS[:3])
    assert mine == its
    for one, other in ((index.picture(mine[0].films[0]), there.picture(its[0].films[0])),):
        assert one is not None
        assert np.array_equal(one, other)
    name = shard_file(1, REPORTS_FILE)
    s3_server.client().delete_object(Bucket="searched", Key=f"index/{name}")
    with pytest.raises(UserError, match=f"index {bucket}/index: {name} is missing"):
        load_index(f"{bucket}/index", model)


def test_a_query_that_cannot_be_answered_is_refused(index: Index) -> None:
    for wrong, told in (
        ({}, "give either films or texts"),
        ({"films": PIXELS[:1], "texts": ["no"]}, "give either films or texts"),
        ({"texts": ["no pneumothorax"], "k": 0}, "k 0: give at least 1"),
        ({"films": ["nowhere.png"]}, r"film 0 \(nowhere.png\) is not a file"),
    ):
        with pytest.raises(UserError, match=told):
            index.search(**wrong)  # type: ignore[arg-type]
    assert index.search(films=[]) == index.search(texts=[]) == []


def test_a_query_needs_faiss_and_no_other_package_of_the_extras(folder: Path) -> None:
    script = (
        WITHOUT_EXTRAS.replace("'faiss', ", "")
        + f"""
import sys
import cmcgns
found = cmcgns.load_index({str(folder)!r}).search(texts=["There is a left pleural effusion."], k=3)
assert len(found[0].films) == 3
assert "ray" not in sys.modules
from cmcgns.commands import main
sys.exit(main(["search", "--search.index={folder}", "--search.text=no pneumothorax", "--search.k=2"]))
"""
    )
    assert "'faiss'" not in script
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nearest reports" in done.stdout


def test_the_python_of_the_page_on_search_runs(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "indexes").mkdir()
    (tmp_path / "indexes" / "NAME").symlink_to(folder)
    (tmp_path / "film.png").write_bytes(png(PIXELS[0]))
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(REPOSITORY / "docs" / "searching.md")
    exec(compile(block, "searching.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5 + 1
