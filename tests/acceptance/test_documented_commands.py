"""The commands of the pages run as they are typed, wherever their data can be made here, on the tiny phantom and 50 own films.

``tests/docs/test_documented_commands.py`` checks the settings of all others. The commands of sweeps run in ``sweep`` and
``sweep_survival``, those of Open-I in ``openi``, the web page in ``search``, submitted jobs in ``job_submission``,
those of examples in ``tests/test_examples.py``.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from pydicom.uid import RLELossless

from cmcgns.phantom import PhantomCorpus, write_mimic_cxr_jpg, write_pairs_csv
from tests.data.test_dicom import compressed, written
from tests.docs.test_documented_commands import ALL
from tests.jobs import REPOSITORY

FIRST = "cmcgns pretrain --config phantom-tiny --run.name=NAME"
"""The run that the others use."""
DATA = {
    "/path/to/folder": "films", "/path/to/export.csv": "hospital/export.csv", "/path/to/mimic-cxr-jpg": "mimic",
    "s3://bucket/prepared": "prepared",
}  # fmt: skip
"""What stands in the pages, and what stands for it here."""
ELSEWHERE = (
    "s3://", "/data/", "/models/", "labels.csv", "cmcgns sweep", "serve=true", "--run.resume", "runs/OTHER", "mimic_cxr.yaml",
    "--method.name=infonce", "FILE.yaml", "examples/",
)  # fmt: skip
"""Parts of commands that need data or time that a test does not have, or that other files run."""


def runnable() -> list[str]:
    """Each command once, the first run and own films before what uses them."""
    found = [FIRST]
    for job, words in ALL.values():
        command = shlex.join(["cmcgns", job, *words])
        for there, here in DATA.items():
            command = command.replace(there, here)
        command = command.replace("jobs/configs/own_pairs.yaml", "own_pairs")
        if command not in found and words and not any(part in command for part in ELSEWHERE):
            found.append(command)
    return found


def write_export(pairs: Path, folder: Path) -> None:
    """The corpus of ``pairs`` as the pages describe a hospital's: other names of columns, films in a folder of their own."""
    folder.mkdir()
    (folder / "films").symlink_to(pairs.parent / "images")
    table = pd.read_csv(pairs, dtype=str)
    table["image"] = table["image"].str.removeprefix("images/")
    names = {"image": "File", "report": "ReportText", "patient": "PatientID", "study": "Accession"}
    table.rename(columns=names).to_csv(folder / "export.csv", sep=";", index=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own films, a tree of MIMIC-CXR-JPG and one DICOM."""
    root = tmp_path_factory.mktemp("documented")
    pairs = write_pairs_csv(PhantomCorpus(50, seed=3, height=144, width=144), root / "films")
    write_export(pairs, root / "hospital")
    write_mimic_cxr_jpg(PhantomCorpus(20, seed=4, height=144, width=144), root / "mimic")
    (root / "film.dcm").write_bytes(written(compressed(RLELossless)))
    return root


@pytest.mark.parametrize("command", runnable())
def test_a_command_of_the_pages_runs(folder: Path, command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    began = time.monotonic()
    done = subprocess.run(shlex.split(command), cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    print(f"{time.monotonic() - began:.0f} s: {command}")
