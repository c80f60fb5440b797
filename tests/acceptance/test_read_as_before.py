"""What was read right before files were held against their headers is read the same, bit for bit; each change has a reason."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pydicom.data
import pytest

from cmcgns.data.text import unescaped
from cmcgns.phantom import PhantomCorpus, write_mimic_cxr, write_mimic_cxr_jpg, write_pairs_csv
from tests.acceptance.earlier import environment, working_tree
from tests.jobs import REPOSITORY

BEFORE = "cc293dfea4b28bb703ab611d9baba39857dd4d94"
STUDIES = 60


def outcomes(tree: Path, films: list[Path], sets: list[Path]) -> dict[str, str]:
    arguments = [str(film) for film in films] + [part for each in sets for part in ("--set", str(each))]
    command = [sys.executable, str(REPOSITORY / "tests/data/reading.py"), *arguments]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def phantom_sets(folder: Path) -> list[Path]:
    """The phantom in each layout of pairs that the earlier commit knows."""
    corpus = PhantomCorpus(STUDIES, seed=7, height=96, width=80)
    for name, write in (("pairs", write_pairs_csv), ("mimic-jpg", write_mimic_cxr_jpg), ("mimic", write_mimic_cxr)):
        write(corpus, folder / name)
    return [folder / name for name in ("pairs", "mimic-jpg", "mimic")]


def reports_with_escapes(openi: Path) -> set[str]:
    """Studies of which a report holds HTML that was read as words."""
    with (openi / "pairs.csv").open(newline="") as table:
        return {row["study"] for row in csv.DictReader(table) if unescaped(row["report"]) != row["report"]}


def test_films_and_reports_are_read_as_before(realdata: Path, openi: Path, tmp_path: Path) -> None:
    pydicom_films = Path(pydicom.data.__file__).parent / "test_files"
    films = [path for path in sorted(pydicom_films.rglob("*")) if path.is_file()]
    films += [path for path in sorted((realdata / "dicom").iterdir()) if path.suffix != ".csv"]
    films += sorted((realdata / "images").iterdir()) + sorted((realdata / "unpaired").iterdir())
    sets = [realdata, openi, *phantom_sets(tmp_path / "sets")]
    with working_tree(BEFORE, tmp_path / "before") as tree:
        before = outcomes(tree, films, sets)
    now = outcomes(REPOSITORY, films, sets)
    assert now.keys() == before.keys()
    changed = {name for name in now if now[name] != before[name]}
    escaped = reports_with_escapes(openi)
    rows = len(now) - len(films)
    print(f"{len(films)} films, {rows} rows, films and reports of {len(sets)} sets: {len(changed)} changed")
    for name in sorted(changed):
        was, is_now = before[name], now[name]
        if was.startswith("bad row") and is_now.startswith("bad row"):
            reason = "the reason says more"
        elif was.startswith("bad row"):
            reason = "read now"
        elif name.startswith("openi/") and name.split("/", 1)[1].split(" ")[0] in escaped:
            reason = "<BR>, &lt; or &gt; had been read as words"
        else:
            pytest.fail(f"{name}: {was} before, {is_now} now")
        print(f"{Path(name).name}: {reason}: {was} -> {is_now}")
    assert sum(not value.startswith("bad row") for value in now.values()) > 0.9 * len(now)
