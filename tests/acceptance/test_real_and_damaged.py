"""Every real DICOM and 120 Open-I reports as their indexes say; damage of every kind is one bad row each, and takes a whole
run no more memory than whole films do.

The files of each kind: tests/data/prepare/test_real_corpora.py and test_damage.py.
"""

import shutil
from pathlib import Path

import pytest

from tests.benchmarks.streaming import Watch
from tests.data.prepare.conftest import local_ray  # noqa: F401
from tests.data.prepare.sets import run
from tests.data.prepare.test_damage import *  # noqa: F403
from tests.data.prepare.test_damage import FILM_HW, MOST_MIB
from tests.data.prepare.test_real_corpora import *  # noqa: F403


def peak_of_a_run(raw: Path, out: Path) -> float:
    """Memory of the job and all that it starts, MiB."""
    watch = Watch()
    done = run(f"--data.uri={raw}", f"--prepare.out={out}", "--data.max_bad_fraction=1")
    peak = watch.end()
    assert done.returncode == 0, done.stdout + done.stderr
    return peak


@pytest.mark.ray
def test_a_whole_run_over_damaged_files_takes_no_more_memory(damaged: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    lines = (damaged / "pairs.csv").read_text().splitlines()
    for line in lines[1:]:
        name = Path(line.split(",")[0]).name
        shutil.copy(damaged / "whole.png", whole / name)
    (whole / "pairs.csv").write_text("\n".join(lines).replace("../", "") + "\n")
    peaks = [peak_of_a_run(folder, tmp_path / f"set{number}") for number, folder in enumerate((whole, damaged))]
    print(f"\n{len(lines) - 1} films of {FILM_HW.shape}: {peaks[0]:.0f} MiB whole, {peaks[1]:.0f} MiB damaged")
    assert peaks[1] < peaks[0] + MOST_MIB
