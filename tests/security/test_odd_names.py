"""Attacks by names: of runs, files, classes and ids."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from cmcgns import storage
from cmcgns.config import RunConfig
from cmcgns.data.readers.base import FileSource
from cmcgns.errors import BadRow
from cmcgns.evaluate.figures import curves
from cmcgns.sweep.config import SweepConfig
from cmcgns.terminal import console, print_plan, printable

ESCAPES = "patient \x1b]0;owned\x07\x1b[2J\x9b31m\r7"


@pytest.mark.parametrize("name", ["../victim", "a/b", "..", "/etc", "a\\..\\b", "", ".hidden", "a\n"])
def test_a_run_or_sweep_is_named_by_a_name_and_not_by_a_path(name: str) -> None:
    for section, key in ((RunConfig, "name"), (RunConfig, "resume"), (SweepConfig, "resume")):
        with pytest.raises(ValidationError, match=f"{key}"):
            section.model_validate({key: name})


def test_control_characters_are_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = console()
    terminal.print(ESCAPES, markup=False)
    terminal.print("failed:", ESCAPES, style="red", markup=False)
    print_plan(terminal, {"data": ESCAPES})
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(said)
    assert said.count("\\x1b]0;owned") == 3


def test_a_plan_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(console(), {"data": "/corpus/[bold]/[/nothing]"})
    assert "/corpus/[bold]/[/nothing]" in capsys.readouterr().out


def test_printable_text_stays_as_it_is() -> None:
    for text in ("plain", "Übergröße 胸部\n\ttab", ""):
        assert printable(text) == text
    assert printable("na\udce9ve") == "na\\udce9ve"
    assert isinstance(console(), Console)


def test_files_whose_names_are_not_utf8_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    for name in (b"good.png", "größe.png".encode(), b"gr\xf6\xdfe.png", b"a/deep\xff.png", b"a/deep.png"):
        (tmp_path / os.fsdecode(name)).touch()
    assert storage.list_files(str(tmp_path)) == ["a/deep.png", "good.png", "größe.png"]
    assert storage.list_files(str(tmp_path), recursive=False) == ["good.png", "größe.png"]
    assert storage.list_folders(str(tmp_path)) == ["a"]
    assert "2 files are left out because their names are not UTF-8" in caplog.text
    caplog.text.encode()


@pytest.mark.parametrize("name", [r"$\frac$", "$x", "a$b$c", r"\alpha_{", "<b>&amp;"])
def test_a_class_with_any_name_gets_its_curve(name: str) -> None:
    draw = np.random.default_rng(0)
    figure = curves("title", draw.random((20, 1)), (np.arange(20) % 2).astype(float)[:, None], [name])
    assert io.BytesIO(figure.png).read(4) == b"\x89PNG"


def test_a_link_that_leaves_the_corpus_is_a_bad_row_unless_links_are_followed(tmp_path: Path) -> None:
    corpus, secret = tmp_path / "corpus", tmp_path / "secret.txt"
    (corpus / "texts").mkdir(parents=True)
    secret.write_text("private")
    (corpus / "texts" / "inside.txt").write_text("Lungs are clear.")
    (corpus / "outside.txt").symlink_to(secret)
    (corpus / "folder").symlink_to(tmp_path)
    (corpus / "within.txt").symlink_to("texts/inside.txt")
    report = lambda path, **options: FileSource(str(corpus), "pairs-csv", **options).read_report({"report_path": path})
    for path in ("outside.txt", "folder/secret.txt"):
        with pytest.raises(BadRow, match=r"report path is a link that leaves the corpus folder.*data\.follow_links"):
            report(path)
        assert report(path, follow_links=True) == "private"
    assert report("within.txt") == report("texts/inside.txt") == "Lungs are clear."
    (tmp_path / "linked").symlink_to(corpus)  # the corpus itself may be a link
    assert (
        FileSource(str(tmp_path / "linked"), "pairs-csv").read_report({"report_path": "within.txt"})
        == "Lungs are clear."
    )
