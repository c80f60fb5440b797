"""Damage: the export of a run lacks a file, a bit or half of its weights, or holds numbers that are none."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from cmcgns.cli import to_yaml
from cmcgns.data.prepare.check_export import check_export, export_folder
from cmcgns.errors import UserError
from cmcgns.library.runs import open_run
from cmcgns.methods.base import load_method
from cmcgns.models.backbones import build_image_backbone
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import write_hashes
from cmcgns.train.checkpoint import EXPORT_FORMAT, export_model
from cmcgns.train.setup import make_tokenizer, open_corpus, sample_reports
from tests.small import small_config


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of an untrained model."""
    folder, config = tmp_path_factory.mktemp("run"), small_config(data__phantom_studies=60)
    tokenizer = make_tokenizer(config, sample_reports(open_corpus(config), 1000))
    model = load_method(config).build_model(tokenizer.vocabulary_size)
    (folder / "export").mkdir()
    export_model(folder / "export", model, model.state_dict(), tokenizer, {"format": EXPORT_FORMAT}, {})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""

    return Path(shutil.copytree(original, tmp_path / "run"))


def test_an_intact_export_gives_the_weights_that_were_exported(run: Path) -> None:
    model = open_run("evaluate.run", str(run)).load_model()
    heads = load_file(run / "export" / "heads.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in heads.items())


def test_every_file_of_an_export_counts(run: Path) -> None:
    files = sorted(path for path in (run / "export").rglob("*") if path.is_file())
    assert len(files) >= 8
    for path in files:
        name, whole = path.relative_to(run / "export").as_posix(), path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged: " + ("" if name == EXPORT_HASHES else name)):
            open_run("evaluate.run", str(run))
        path.unlink()
        with pytest.raises(UserError, match=f"{name} is missing|has no export"):
            open_run("evaluate.run", str(run))
        path.write_bytes(whole)
    open_run("evaluate.run", str(run))


@pytest.mark.parametrize("part", ["heads", "image_encoder/model", "text_encoder/model"])
def test_an_export_without_half_of_its_weights_is_refused(run: Path, part: str) -> None:
    path = run / "export" / f"{part}.safetensors"
    weights = load_file(path)
    save_file({name: weights[name] for name in list(weights)[::2]}, path, metadata={"format": "pt"})
    (run / "export" / EXPORT_HASHES).unlink()
    write_hashes(run / "export", EXPORT_HASHES)  # whoever did this wrote the hashes too
    with pytest.raises(UserError, match=r"missing or unexpected|lacks \d+ weights"):
        open_run("evaluate.run", str(run)).load_model()


@pytest.mark.parametrize("part", ["heads", "image_encoder/model", "text_encoder/model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run: Path, part: str, value: float) -> None:
    path = run / "export" / f"{part}.safetensors"
    weights = load_file(path)
    name = next(name for name, each in weights.items() if each.is_floating_point() and each.numel() > 1)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    (run / "export" / EXPORT_HASHES).unlink()
    write_hashes(run / "export", EXPORT_HASHES)
    with pytest.raises(UserError, match="not finite"):
        open_run("evaluate.run", str(run)).load_model()


def test_an_export_of_an_earlier_version_is_read_with_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "export" / EXPORT_HASHES).unlink()
    (run / "export" / "preprocess.json").write_text("{}")
    open_run("evaluate.run", str(run)).load_model()
    assert "it is not verified" in caplog.text


def test_a_folder_of_an_encoder_without_some_weights_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    build_image_backbone(str(tmp_path), 64, 0.0)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its architecture: layernorm\.weight"):
        build_image_backbone(str(tmp_path), 64, 0.0)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32


def check(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    folder = export_folder(str(run))
    assert folder == str(run / "export") == export_folder(folder)
    status = check_export(folder)
    return status, " ".join(capsys.readouterr().out.split())


def test_the_check_of_an_export_names_files_with_identifiers_and_never_what_it_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = check(run, capsys)
    assert status == 0
    assert said.endswith("is unchanged and has no identifier that the rules find")

    vocabulary = run / "export" / "tokenizer" / "tokenizer.json"
    values = json.loads(vocabulary.read_text())
    values["model"]["vocab"] |= {"mrn4711": 10_000, "##20240314": 10_001}
    vocabulary.write_text(json.dumps(values))
    (run / "export" / "preprocess.json").write_text(
        json.dumps({"source": "/data/ward", "note": "dictated by Anna Smith, 3/14/2024"})
    )
    (run / "export" / EXPORT_HASHES).unlink()
    write_hashes(run / "export", EXPORT_HASHES)
    status, said = check(run, capsys)
    assert status == 0
    assert "identifier in export: 3" in said
    assert "preprocess.json has date and name" in said
    assert "preprocess.json has a path" in said
    assert re.search(r"tokenizer/tokenizer.json has 2 words with digits among \d+", said)
    assert not [secret for secret in ("Smith", "4711", "2024", "ward") if secret in said.replace(str(run), "")]


def test_the_check_of_an_export_fails_on_files_that_do_not_belong_and_on_damage(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "export" / "reports.csv").write_text("id,report")
    status, said = check(run, capsys)
    assert (status, "reports.csv is no part of the export" in said) == (1, True)
    (run / "export" / "heads.safetensors").write_bytes(b"")
    status, said = check(run, capsys)
    assert (status, "heads.safetensors is not what was written" in said) == (1, True)
