"""Models on the Hugging Face hub: OWNER/NAME is downloaded, checked, and never mistaken for a folder here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cmcgns
from cmcgns.library.export import export_run
from cmcgns.library.hub import download, is_hub_name
from cmcgns.library.model import Model
from tests.hub import COMMIT, running_hub
from tests.jobs import REPOSITORY

FILM = np.random.default_rng(0).integers(0, 255, (60, 50), np.uint8)
SCRIPT = """
import json, sys
import numpy as np
import cmcgns
film = np.random.default_rng(0).integers(0, 255, (60, 50), np.uint8)
found = []
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        model = cmcgns.load(name, revision=revision or None, progress=not revision)
        found.append([model.run.identity(), model.embed_films([film]).tolist()])
    except cmcgns.UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def load_elsewhere(folder: Path, address: str, *names: str) -> tuple[list[list[object] | str], str]:
    """Identity and embedding, or the message, for each NAME or NAME@REVISION (this without bars), and what was written to stderr;
    in a new process with an empty cache and an empty working folder."""
    (folder / "here" / "models").mkdir(parents=True)
    shown = {"TQDM_POSITION": "-1"}  # bars also where stderr is no terminal
    cache = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *names], cwd=folder / "here", capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **cache, **shown}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[object] | str] = json.loads(done.stdout)
    return found, done.stderr


def test_a_name_of_the_hub_loads_the_export_that_was_uploaded(run: Path, model: Model, tmp_path: Path) -> None:
    whole, broken = (Path(export_run(str(run), str(tmp_path / name))) for name in ("whole", "broken"))
    heads = broken / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\1")
    with running_hub({"hospital/films": whole, "hospital/broken": broken}) as address:
        found, bars = load_elsewhere(
            tmp_path,
            address,
            "hospital/films",
            "hospital/films",
            "hospital/broken",
            "hospital/none",
            "models/films",
            "runs/p",
            "runs/p@main",
            "hospital/films@v2",
        )
        pinned, no_bars = load_elsewhere(tmp_path / "pinned", address, f"hospital/films@{COMMIT}")
    assert pinned == found[:1]
    assert "Download" in bars
    assert "Download" not in no_bars
    assert found[0] == found[1] == [model.run.identity(), model.embed_films([FILM]).tolist()]
    for message, words in zip(
        found[2:],
        (
            "is damaged: heads.safetensors is not what was written",
            "cmcgns.load hospital/none is no folder here, and cannot be had from the Hugging Face hub (404",
            "models/films does not exist; give the folder of a finished run",
            "runs/p does not exist; give the folder of a finished run",
            "revision 'main' is for OWNER/NAME on the Hugging Face hub, not for runs/p; leave it out",
            "hospital/films is no folder here, and cannot be had at revision v2 from the Hugging Face hub (404",
        ),
        strict=True,
    ):
        assert words in str(message)


def test_what_may_be_a_folder_here_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    no_names = ("film", "/a/b", "./a/b", "a/b/c", "../b", "s3://a/b", "a/", "~/b", "a/..", "runs/p", "models/p")
    assert not any(map(is_hub_name, no_names))
    assert not is_hub_name(Path("exports/clip"))  # a path is a folder, mounted or not
    assert is_hub_name("hospital/chest-films_2.0")
    with pytest.raises(cmcgns.UserError, match=r"models/p does not exist; give the folder of a finished run"):
        cmcgns.load("models/p")


def test_a_proxy_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with pytest.raises(cmcgns.UserError, match=r"someone/model is no folder here, and cannot be had .*refused"):
        download("cmcgns.load", "someone/model")
