"""One run that streams its corpus from a bucket and trains encoders from local folders."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from cmcgns.data.reports import parse_report
from cmcgns.data.tokenizer import train_tokenizer
from cmcgns.models.backbones import build_image_backbone, build_text_backbone
from cmcgns.phantom import PhantomCorpus
from tests.jobs import REPOSITORY
from tests.ray_head import RayHead
from tests.s3 import S3Server
from tests.streaming import Watched, fill_bucket, watch_run

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STUDIES, STEPS = 500, 3
AHEAD = 128
"""The least that training allows, 8 microbatches of 16: this epoch and the next one, begun early, read some 200 studies each."""
SMALL = (
    "--train.learning_rate=1e-7", "--train.warmup_steps=0", "--train.num_workers=1", "--train.threads_per_worker=1",
    "--train.engine=torch", "--train.zero_stage=0", "--clustering.actors=1", f"--data.studies_ahead={AHEAD}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture(scope="module")
def encoders(folder: Path) -> dict[str, PreTrainedModel]:
    """An image encoder, and a text encoder with its tokenizer, in folders like those of the hub."""
    corpus = PhantomCorpus(200, seed=0, height=72, width=72)
    sentences = [(str(i), each) for i in range(200) for each in parse_report(corpus.study(i).report).sentences]
    torch.manual_seed(3)
    image, text = build_image_backbone("vit-tiny", 64, 0.0), build_text_backbone("bert-tiny", 1024, 128, 0.0)
    image.half().save_pretrained(folder / "image")  # many encoders on the hub are stored in half precision
    text.save_pretrained(folder / "text")
    train_tokenizer(sentences, 1024, 128, 16).save(folder / "text")
    return {"image": image, "text": text}


@pytest.fixture(scope="module")
def watched(
    ray_head: RayHead,
    s3_server: S3Server,
    folder: Path,
    encoders: dict[str, PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Watched:
    uri, films = fill_bucket(s3_server, "streamed", STUDIES, tmp_path_factory.mktemp("corpus"), workers=1)
    models = [f"--model.{name}_encoder={os.path.relpath(folder / name, REPOSITORY)}" for name in encoders]
    runs = tmp_path_factory.mktemp("runs")
    return watch_run(ray_head, s3_server, uri, films, runs, STEPS, *models, *SMALL, memory=False)


def test_the_first_step_comes_before_all_films_have_been_asked_for(watched: Watched) -> None:
    print(f"\n{watched.films_before_first_step} of {watched.films} films before the first step")
    assert 0 < watched.share_before_first_step < 1


def test_pretrained_encoders_are_trained_on_from_their_own_weights(
    watched: Watched, encoders: dict[str, PreTrainedModel]
) -> None:
    for name, before in encoders.items():
        after = AutoModel.from_pretrained(watched.folder / "export" / f"{name}_encoder").state_dict()
        for key, weight in before.state_dict().items():
            if "pooler" not in key:
                assert after[key].dtype == torch.float32
                torch.testing.assert_close(after[key], weight.float(), rtol=0, atol=1e-5, msg=key)
