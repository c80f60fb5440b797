"""Prompts: the built-in ones cover every class of every set; a user's file is checked before anything runs."""

import re
from pathlib import Path

import pytest

from cmcgns.data.labelled import SETS
from cmcgns.data.labelled.classified import CLASSES as COVIDX
from cmcgns.data.labelled.classified import COMPETITION
from cmcgns.data.labelled.classified import FINDINGS as NIH
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.tasks.zeroshot import read_prompts
from cmcgns.library.texts import Prompts
from cmcgns.phantom import FINDINGS

COVERED = {
    "phantom": FINDINGS,
    "chexpert": tuple(COMPETITION),
    "nih": NIH,
    "rsna": ("pneumonia",),
    "siim": ("pneumothorax",),
    "covidx": COVIDX[0],
}


def read(folder: Path, text: str) -> dict[str, Prompts]:
    (folder / "prompts.yaml").write_text(text, encoding="utf-8")
    return read_prompts(EvaluateConfig(prompts=str(folder / "prompts.yaml")))


@pytest.mark.parametrize("name", COVERED)
def test_our_prompts_cover_every_class(name: str) -> None:
    prompts = read_prompts(EvaluateConfig())[name]
    assert set(COVERED[name]) <= set(prompts)
    for sides in prompts.values():
        sentences = [text for side in sides.values() for text in side]
        assert sides.keys() <= {"present", "absent"}
        assert all(isinstance(text, str) and text.endswith(".") for text in sentences)
        assert len(set(sentences)) == len(sentences)
    # non-exclusive classes are each compared with their absence
    assert name == "covidx" or all(sides["absent"] for sides in prompts.values())


def test_our_prompts_are_for_sets_that_there_are() -> None:
    assert set(read_prompts(EvaluateConfig())) <= {"phantom", *SETS}


def test_prompts_of_ones_own_are_read_as_they_are_written(tmp_path: Path) -> None:
    fracture = "fracture: {present: [There is a fracture.], absent: [No fracture.]}"
    found = read(tmp_path, f"mine:\n  {fracture}\n  mass: {{present: [A mass.]}}")
    assert found == {
        "mine": {
            "fracture": {"present": ["There is a fracture."], "absent": ["No fracture."]},
            "mass": {"present": ["A mass."]},
        }
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mine: {fracture: {present: [", "is not YAML"),
        ("", "needs sentences under `present`"),
        ("just words", "needs sentences under `present`"),
        ("[mine]", "needs sentences under `present`"),
        ("mine: [fracture]", "needs sentences under `present`"),
        ("mine: {fracture: }", "fracture needs sentences under `present`"),
        ("mine: {fracture: {absent: [No fracture.]}}", "fracture needs sentences under `present`"),
        ("mine: {fracture: {present: []}}", "fracture needs sentences under `present`"),
        ("mine: {fracture: {present: There is a fracture.}}", "fracture needs sentences under `present`"),
        ("mine: {fracture: {present: [Yes]}}", "fracture needs sentences under `present`"),
        ("mine: {mass: {present: [A mass.]}, fracture: {present: [A.], absent: No fracture.}}", ": fracture needs"),
        ("mine: {fracture: {present: [A.], abscent: [No fracture.]}}", ": fracture needs"),
    ],
)  # fmt: skip
def test_a_file_that_is_laid_out_otherwise_is_refused_by_its_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        read(tmp_path, text)
    assert str(tmp_path / "prompts.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml does not exist"):
        read_prompts(EvaluateConfig(prompts=str(tmp_path / "nowhere.yaml")))
    (tmp_path / "prompts.yaml").write_bytes(b"mine: {fracture: {present: [\xff\xfe]}}")
    with pytest.raises(UserError, match=r"prompts.yaml is not YAML"):
        read_prompts(EvaluateConfig(prompts=str(tmp_path / "prompts.yaml")))
