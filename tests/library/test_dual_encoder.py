"""The export for plain transformers: one model whose features are our embeddings, for texts as one types them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, VisionTextDualEncoderModel

import cmcgns
from cmcgns.commands import main
from cmcgns.data.prepare.check_export import check_files, find_identifiers
from cmcgns.data.reports import normalised_words, parse_report
from cmcgns.errors import UserError
from cmcgns.library.dual_encoder import compare, dual_encoder, plain_tokenizer
from cmcgns.library.export import CARD, export_run
from cmcgns.library.runs import open_run
from cmcgns.models.attention import unit
from cmcgns.phantom import PhantomCorpus
from tests.evaluate.test_embed_job import write_run
from tests.library.conftest import CONFIG
from tests.small import small_config

PHANTOM = PhantomCorpus(studies=100, seed=3, height=60, width=48)
FITS = small_config(method__name="clip", objective__text_pooling="cls", data__max_tokens=256)
TYPED = (
    "There is a left pleural effusion.", "No pneumothorax!", "The patient's heart is 2.5 cm larger (since 3 a.m.).",
    "L.A., the U.S.A. and x-ray: 1.2.3 (v2); it’s 'fine'", "under_score 5. 'quoted' rock'n'roll",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the model for transformers, beside the run that it is of."""
    folder = tmp_path_factory.mktemp("dual")
    weights = write_run(folder / "run", FITS).state_dict()
    assert any(name.endswith("projection.bias") for name in weights)
    assert main(["export", str(folder / "run"), str(folder / "out"), "--transformers"]) == 0
    return folder


def features(found: Any) -> np.ndarray:
    return unit(found.pooler_output).detach().numpy()


def test_plain_transformers_gives_our_embeddings_of_films_and_texts(exported: Path) -> None:
    model, plain = cmcgns.load(str(exported / "out")), AutoModel.from_pretrained(exported / "out").eval()
    assert isinstance(plain, VisionTextDualEncoderModel)
    films = [PHANTOM.render(i) for i in range(7)]
    pixels_B1HW = model._seen(np.stack(list(model._squares(films))))
    found = features(plain.get_image_features(pixel_values=pixels_B1HW.expand(-1, 3, -1, -1)))
    assert np.abs(found - model.embed_films(films)).max() <= 1e-6
    tokenizer = AutoTokenizer.from_pretrained(exported / "out")
    reports = [" ".join(parse_report(PHANTOM.study(i).report).sentences) for i in range(7)]
    for texts in (reports, list(TYPED[:2])):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        found = features(plain.get_text_features(**tokens))
        assert np.abs(found - model.embed_reports(texts)).max() <= 1e-6
    tokens = tokenizer(reports, padding=True, return_tensors="pt")
    logits = plain(pixel_values=pixels_B1HW.expand(-1, 3, -1, -1), **tokens).logits_per_image.detach().numpy()
    expected = model.embed_films(films) @ model.embed_reports(reports).T / 0.07
    assert logits == pytest.approx(expected, abs=1e-4)


def test_projections_with_large_biases_are_kept(exported: Path) -> None:
    """A run's biases grow from zero; the tangent of a BERT's pooler must not bend the channels."""
    run = open_run("export", str(exported / "run"))
    model, config = run.load_model().eval(), run.config
    with torch.no_grad():
        for projection in (model.image_projection, model.text_encoder.projection):
            projection.bias.normal_(0, 3)
            projection.weight.mul_(5)
    made = dual_encoder(model, config.model.embed_dim).eval()
    compare(made, model, config, run.vocabulary_size)
    with torch.no_grad():
        made.text_model.pooler.dense.bias[0] += 1e-5 * 2**-20 * 100
    with pytest.raises(
        UserError, match=r"features of texts in transformers differ from ours by .*; leave out --transf"
    ):
        compare(made, model, config, run.vocabulary_size)


def test_the_tokenizer_for_transformers_reads_what_one_types_as_a_sentence_of_a_report(exported: Path) -> None:
    tokenizer = open_run("export", str(exported / "run")).tokenizer
    plain = plain_tokenizer(tokenizer)
    for text in (*TYPED, *(PHANTOM.study(i).report for i in range(20))):
        expected = tokenizer.pieces.encode(" ".join(normalised_words(text))).ids
        assert plain(text)["input_ids"] == expected


def test_the_export_stays_whole_loads_as_before_and_says_how_transformers_loads_it(exported: Path) -> None:
    out = str(exported / "out")
    assert check_files(out) == []
    assert find_identifiers(out) == []
    card = (exported / "out" / CARD).read_text()
    assert "AutoModel.from_pretrained" in card
    run = cmcgns.load(str(exported / "run"))
    assert cmcgns.load(out).run.identity() == run.run.identity()  # an index of the one is searched with the other


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIG, "its image encoder is a ResNetModel with attention pooling"),
        (small_config(), "its texts are not pooled by \\[CLS\\]"),
        (small_config(method__name="clip", objective__text_pooling="mean"), "its texts are not pooled by \\[CLS\\]"),
        (
            small_config(method__name="clip", objective__text_pooling="cls", objective__heads="mlp"),
            "a projection is not linear",
        ),
        (
            small_config(method__name="clip", objective__text_pooling="cls", model__embed_dim=160),
            "an encoder of 128 channels is narrower than the embedding of 160",
        ),
    ],
    ids=["resnet", "sentences", "mean", "mlp", "wide"],
)
def test_a_model_that_does_not_fit_is_refused_with_the_reason(config: Any, reason: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", config)
    with pytest.raises(
        UserError, match=f"--transformers cannot hold this model: {reason}.*; leave it out, cmcgns.load"
    ):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"), transformers=True)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "run")
