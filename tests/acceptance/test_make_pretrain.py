"""`make pretrain` on a fresh clone: installs, trains both stages and learns, in under ten minutes on two cores.

Afterwards its sentences point at what they name: the pointing game is at twice chance, the contrast to noise above 0.5.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.jobs import REPOSITORY, check_learned, result

LIMIT_S = 600


def test_make_pretrain_on_a_fresh_clone_ends_in_ten_minutes(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_", "LANG"))}
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if ".venv" not in part)
    started = time.monotonic()
    with (tmp_path / "output").open("w") as output:
        subprocess.run(
            ["make", "pretrain"], cwd=clone, env=kept | {"PATH": path, "HOME": str(home)}, stdout=output, stderr=output,
            check=False, timeout=3 * LIMIT_S,
        )  # fmt: skip
    taken_s = time.monotonic() - started
    text = (tmp_path / "output").read_text()
    runs = list((clone / "runs").glob("pretrain-*"))
    assert runs, text[-3000:]
    assert result(runs[0])["status"] == "finished", text[-3000:]
    print(f"\nmake pretrain, installation included: {taken_s:.0f} s")
    check_learned(runs[0], least=60)
    check_grounded(clone)
    shutil.rmtree(clone)
    assert taken_s < LIMIT_S


def check_grounded(clone: Path) -> None:
    """Evaluate the clone's last run as the documentation says, on studies that it has not seen."""
    command = [".venv/bin/python", "jobs/evaluate.py", "--evaluate.tasks=[grounding]", "--run.name=grounding"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    evaluation = json.loads((clone / "runs" / "grounding" / "evaluation.json").read_text())
    scores = {score["metric"]: score for score in evaluation["scores"] if score["encoder"] == "pretrained"}
    pointing, contrast = scores["pointing game"], scores["contrast to noise"]
    chance = re.search(r"by chance ([\d.]+)", pointing["note"])
    assert chance is not None
    print(f"pointing game {pointing['value']:.3f} (by chance {chance[1]}), contrast to noise {contrast['value']:.2f}")
    assert pointing["value"] >= 2 * float(chance[1])
    assert contrast["value"] > 0.5
