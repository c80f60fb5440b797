"""The answer to a query: matching sentences and heat maps as the library has them, on the terminal, as JSON and as a page."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from cmcgns import load_index
from cmcgns.library.model import Model
from cmcgns.library.texts import embed_sentences
from cmcgns.search.answer import answer_film, answer_text
from cmcgns.search.index import Index
from tests.data.test_dicom import compressed, written
from tests.jobs import run_here
from tests.library.test_model import png
from tests.search.made import FILMS, PIXELS, REPORTS, make_index

ATTACK = "<script>alert('x')</script>"


def test_the_marked_sentence_of_a_report_is_the_nearest_and_looks_where_the_library_says(
    index: Index, model: Model
) -> None:
    (query_D,) = model.embed_reports(["There is a left pleural effusion."])
    answer = answer_text(index, "There is a left pleural effusion.", 4)
    assert len(answer.films) == len(answer.reports) == 4
    for match in (*answer.films, *answer.reports):
        cosines = embed_sentences(model.network, model.run.tokenizer, match.case.sentences) @ query_D
        assert match.sentence == match.case.sentences[int(np.argmax(cosines))]
        np.testing.assert_allclose(match.cosine_S, cosines, atol=1e-5)
        row = match.case.row
        heat = model.heatmap(PIXELS[row], REPORTS[row])
        assert heat.sentences == match.case.sentences
        assert np.array_equal(match.film, heat.film_HW)
        assert match.heat is not None
        difference = np.abs(np.asarray(match.heat, int) - np.asarray(heat.picture(match.best), int))
        assert difference.max() <= 1  # of rounding: a batch of films, and one


def test_a_film_is_answered_with_where_the_nearest_sentence_looks_on_it(index: Index, model: Model) -> None:
    answer = answer_film(index, png(PIXELS[7]), 3)
    first = answer.reports[0]
    heat = model.heatmap(PIXELS[7], REPORTS[first.case.row])
    assert np.array_equal(answer.film, heat.film_HW)
    assert answer.heat is not None
    difference = np.abs(np.asarray(answer.heat, int) - np.asarray(heat.picture(first.best), int))
    assert difference.max() <= 1
    assert answer.sentence == first.sentence


class Sources(HTMLParser):
    """Every address in a page, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.addresses = list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]


def test_the_page_has_every_picture_in_it_and_no_text_becomes_markup(index: Index) -> None:
    page = answer_text(index, f"{ATTACK} pleural effusion", 3).page().decode()
    found = Sources(page)
    assert "script" not in found.tags
    assert page.count("&lt;script&gt;") == 1
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    pictures = [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in found.addresses]
    assert {picture.size for picture in pictures} == {(48, 48)}
    assert len(pictures) == 2 * (3 + 3)  # film and heat map
    assert page.count("<mark") == 3 + 3
    assert "default-src 'none'" in page
    assert "as the model reads them, in lower case and without commas" in page
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"data:image/png;base64,[\w+/=]+", "", page))


def test_without_pictures_or_attention_an_answer_has_sentences_alone(
    model: Model, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = load_index(make_index(tmp_path / "bare", model, pictures=False), model)
    page = answer_text(bare, "no pneumothorax", 3).page().decode()
    assert Sources(page).addresses == []
    assert page.count("<mark") == 6
    monkeypatch.setattr(type(model.method), "has_attention", False)
    answer = answer_film(index, PIXELS[0], 2)
    assert answer.heat is None
    assert all(match.film is not None and match.heat is None for match in answer.films)
    assert len(Sources(answer.page().decode()).addresses) == 1 + 4


def test_the_job_prints_the_answer_and_writes_json_and_page(folder: Path, tmp_path: Path) -> None:
    """A film of each kind, a sentence, a report in a file; as the library answers."""
    (tmp_path / "film.dcm").write_bytes(written(compressed(RLELossless)))
    Image.fromarray(PIXELS[2]).save(tmp_path / "film.png")
    Image.fromarray(PIXELS[2]).save(tmp_path / "film.jpg", quality=95)
    (tmp_path / "report.txt").write_text(REPORTS[2])
    for query in ("film=film.png", "film=film.jpg", "film=film.dcm", "report=report.txt", "text=No"):
        done = run_here(
            tmp_path, "search", f"--search.index={folder}", f"--search.{query}", "--search.k=3", "--search.json=a.json",
            "--search.page=a.html",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
        assert len(found["films"]) == len(found["reports"]) == 3
        for case in (*found["films"], *found["reports"]):
            assert case["study_id"] in done.stdout
            assert case["nearest_sentence"] in case["sentences"]
        if query in ("film=film.png", "report=report.txt"):
            of = "films" if query.startswith("film") else "reports"
            assert found[of][0]["film"] == f"{FILMS[2][0]}/{FILMS[2][1]}"
            assert found[of][0]["cosine"] == pytest.approx(1, abs=1e-5)
        assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
        for written_to in (
            f"JSON with texts of the corpus written to {tmp_path}/a.json",
            f"written to {tmp_path}/a.html",
        ):
            assert written_to in done.stdout
    assert found["query"] == {"text": "No"}


def test_what_cannot_be_searched_is_refused_with_one_message(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7 Jane Doe")
    wrong: list[tuple[list[str], str]] = [
        ([], "search.index is missing"),
        (["--search.index=none", "--search.text=no"], "none has no index.json; give the folder of an index"),
        (["--search.index=none"], "search.run is missing; name a finished run"),
        (["--search.index=none", "--search.run=nowhere"], "search.run"),
        ([f"--search.index={folder}", "--search.text=a", "--search.film=b.png"], "give one query"),
        ([f"--search.index={folder}", "--search.film=none.png"], "search.film (none.png) is not a file"),
        ([f"--search.index={folder}", "--search.film=letter.pdf"], "cannot be used"),
        ([f"--search.index={folder}", "--search.report=none.txt"], "search.report none.txt is not a file"),
        ([f"--search.index={folder}", "--search.text=..."], "text 0 has no word"),
        ([f"--search.index={folder}", "--search.text=a b c", "--search.k=0"], "must be at least 1"),
        ([f"--search.index={folder}", "--search.run=none", "--search.json=x"], "search.json is for the answer"),
        ([f"--search.index={folder}", "--search.text=a b c", "--search.run=nowhere"], "nowhere does not exist"),
    ]
    for settings, message in wrong:
        done = run_here(tmp_path, "search", *settings)
        assert done.returncode == 2, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert message in done.stderr, done.stderr
        assert "Jane" not in done.stdout + done.stderr
