"""Encoders and tokenizer out of local folders, as they come from a hub, through the whole job."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from cmcgns.data.phantom import PhantomCorpus
from cmcgns.data.reports import parse_report
from cmcgns.models.presets import build_image_backbone, build_text_backbone
from cmcgns.models.tokenizer import train_tokenizer
from tests.jobs import REPOSITORY, Job, result

pytestmark = pytest.mark.ray


def test_pretrained_encoders_are_trained_on_from_their_own_weights(tmp_path: Path) -> None:
    corpus = PhantomCorpus(200, seed=0, height=72, width=72)
    sentences = [each for i in range(200) for each in parse_report(corpus.study(i).report).sentences]
    tokenizer = train_tokenizer(sentences, 1024, 128, 16)
    torch.manual_seed(3)
    image, text = build_image_backbone("vit-tiny", 64, 0.0), build_text_backbone("bert-tiny", 1024, 128, 0.0)
    image.half().save_pretrained(tmp_path / "image")  # many a hub's encoder is stored in half precision
    text.save_pretrained(tmp_path / "text")
    tokenizer.save(tmp_path / "text")
    image_folder, text_folder = (os.path.relpath(tmp_path / name, REPOSITORY) for name in ("image", "text"))
    job = Job(
        tmp_path / "runs", "--run.name=run", f"--model.image_encoder={image_folder}", f"--model.text_encoder={text_folder}",
        "--data.phantom_studies=200", "--train.stage1_steps=2", "--train.stage2_steps=1", "--train.warmup_steps=0",
        "--train.learning_rate=1e-7",
    )  # fmt: skip
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert result(tmp_path / "runs" / "run")["status"] == "finished"
    for name, before in (("image", image), ("text", text)):
        after = AutoModel.from_pretrained(tmp_path / "runs" / "run" / "export" / f"{name}_encoder").state_dict()
        for key, weight in before.state_dict().items():
            if "pooler" not in key:
                assert after[key].dtype == torch.float32
                torch.testing.assert_close(after[key], weight.float(), rtol=0, atol=1e-5, msg=key)
