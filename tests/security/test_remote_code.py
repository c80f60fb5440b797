"""Attack: the folder of an encoder brings Python files, and its config asks for them to be run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cmcgns.data.tokenizer import load_tokenizer
from cmcgns.errors import UserError
from cmcgns.models.backbones import build_image_backbone, build_text_backbone

CODE = "import pathlib\npathlib.Path({mark!r}).mkdir()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: build_image_backbone(folder, 64, 0.0),
        lambda folder: build_text_backbone(folder, 100, 64, 0.0),
        lambda folder: load_tokenizer(folder, folder, 64, 8),
    ],
    ids=["image encoder", "text encoder", "tokenizer"],
)
def test_code_in_a_model_folder_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    with pytest.raises(UserError, match=r"custom code|trust_remote_code|execute"):
        load(str(folder))
    assert not mark.exists()
