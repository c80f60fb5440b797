"""The notebook of the examples runs from top to bottom in a Jupyter kernel, in under ten minutes."""

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

from tests.jobs import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "phantom.ipynb"
PACKAGES = ("nbclient", "ipykernel")
RUN = """
import nbformat, nbclient, sys
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600).execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    venv.create(tmp_path / "jupyter", with_pip=True)
    (python,) = (tmp_path / "jupyter/bin").glob("python3")
    here = Path(os.__file__).parent.name  # python3.11
    site = tmp_path / "jupyter/lib" / here / "site-packages"
    (site / "project.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "source.pth").write_text(str(REPOSITORY))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": paths, "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "work").mkdir()
    began = time.monotonic()
    command = [python, "-c", RUN, str(NOTEBOOK), str(tmp_path / "done.ipynb")]
    done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = time.monotonic() - began
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # losses, a film, a heat map
    assert (tmp_path / "work/runs/notebook/report.html").is_file()
    print(f"{seconds:.0f} s, {len(pictures)} pictures")
    assert seconds < 600
