"""`report.html` of a run and of two side by side, in a real browser without a network: whole, with every picture, and silent."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cmcgns.commands import main
from tests.browser import Browser, running_browser
from tests.jobs import REPOSITORY, Job

pytestmark = pytest.mark.ray

RECONSTRUCTION = "reconstruction.png"
SECTIONS = (
    "Losses", "Recall on the validation split", "Speed", "Optimizer", "Features and clustering", "Where time went",
    "Last validation", "Reports that films find", "Films that reports find", "Where sentences look", "Clusters of sentences",
    RECONSTRUCTION, "Settings and versions",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two finished runs of CM-CGNS on the generated corpus, which reconstruct films and cluster."""
    storage, made = tmp_path_factory.mktemp("report"), list[str]()
    for seed in (0, 1):
        job = Job(storage / "runs", f"--run.name=seed-{seed}", f"--train.seed={seed}")
        said = job.wait()
        assert job.process.returncode == 0, said[-3000:]
        assert f"cmcgns report {storage}/runs/seed-{seed}" in said.replace("\n", "")
        made.append(f"{storage}/runs/seed-{seed}")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def check_page(browser: Browser, path: Path, runs: int) -> None:
    """Opened as a file, the page asks for nothing, has every section and picture, and the browser complains of nothing."""
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(f"file://{path}")
    assert browser.requests == [f"file://{path}"]
    assert browser.complaints == []
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    headings = browser.evaluate("[...document.querySelectorAll('h2, h3, p')].map(each => each.innerText)")
    for section in SECTIONS:
        assert any(section in heading for heading in headings), section
    pictures = {
        text: browser.evaluate(f"[...document.images].filter(image => image.alt.includes({text!r})).length")
        for text in (
            "looks for its report",
            "film found",
            "where the sentence looks",
            "near the centroid",
            "reconstruction",
        )
    }
    print(
        f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB, {browser.evaluate('document.images.length')} pictures: {pictures}"
    )
    assert pictures["looks for its report"] == 4 * runs
    assert pictures["film found"] == 12 * runs
    assert 4 * runs < pictures["where the sentence looks"] <= 8 * runs  # two sentences of each study, if it has two
    assert pictures["near the centroid"] > 10 * runs
    assert pictures["reconstruction"] == runs
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is wider than the window
    keep = REPOSITORY / ".cache" / "acceptance"
    keep.mkdir(parents=True, exist_ok=True)
    browser.screenshot(keep / f"report-{runs}.png")


def test_the_report_of_a_run_is_whole_and_asks_for_nothing(runs: list[str], browser: Browser) -> None:
    assert main(["report", runs[0]]) == 0
    check_page(browser, Path(runs[0]) / "report.html", 1)


def test_two_runs_are_side_by_side(runs: list[str], browser: Browser, tmp_path: Path) -> None:
    assert main(["report", *runs, f"--out={tmp_path}/compare.html"]) == 0
    check_page(browser, tmp_path / "compare.html", 2)
    rows = browser.evaluate("[...document.querySelectorAll('table')].map(each => each.innerText)")
    assert any("train.seed\t0\t1" in row for row in rows)


def test_without_samples_the_page_shows_no_film(runs: list[str], browser: Browser, tmp_path: Path) -> None:
    assert main(["report", *runs, "--samples=0", f"--out={tmp_path}/bare.html"]) == 0
    browser.open(f"file://{tmp_path}/bare.html")
    alts = browser.evaluate("[...document.images].map(image => image.alt)")
    assert set(alts) <= {*SECTIONS} - {RECONSTRUCTION}
    assert browser.text().count("left out: all films and sentences: --samples=0") == 2
