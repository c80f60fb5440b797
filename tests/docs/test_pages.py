"""Pages say what works: their Python runs, their links lead somewhere, and the settings reference is current."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from cmcgns.commands import COMMANDS, main
from cmcgns.config import METHODS
from cmcgns.library.export import export_run
from docs import make_settings
from tests.data.test_dicom import compressed, written
from tests.evaluate.test_embed_job import write_run
from tests.jobs import REPOSITORY
from tests.library.conftest import run as run  # a run folder
from tests.library.test_dual_encoder import FITS

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "CONTRIBUTING.md"]
LONGEST_README = 8000


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a run, an export for transformers, a PNG and a compressed DICOM under the names that the pages use."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(run)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50), np.uint8)).save(tmp_path / "film.png")
    (tmp_path / "film.dcm").write_bytes(written(compressed(RLELossless)))
    write_run(tmp_path / "fits", FITS)
    export_run(str(tmp_path / "fits"), str(tmp_path / "OUT"), transformers=True)
    monkeypatch.chdir(tmp_path)
    blocks, names = python_blocks(REPOSITORY / name), dict[str, object]()
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert Image.open(tmp_path / "heat.png").size == (48, 48)
    assert capsys.readouterr().out.strip()


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_bytes()) <= LONGEST_README


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_settings_reference_is_current() -> None:
    assert make_settings.PAGE.read_text() == make_settings.page(), "run python -m docs.make_settings"


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"report", "export"}))  # these have no settings
def test_the_settings_reference_names_every_key_of_every_job(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As --help lists them, for each method."""
    text = make_settings.PAGE.read_text()
    for method in METHODS if name == "pretrain" else (None,):
        assert main([name, "--help", *([f"--method.name={method}"] if method else [])]) == 0
        keys = re.findall(r"^  --(\S+) \(", capsys.readouterr().out, re.MULTILINE)
        assert keys
        assert [key for key in keys if f"| `{key}` |" not in text] == []
