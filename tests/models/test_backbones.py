"""Encoders by preset, folder or name, and what is said where there is none."""

from pathlib import Path

import pytest
import torch

from cmcgns.errors import UserError
from cmcgns.models.backbones import ImageEncoder, build_image_backbone, build_text_backbone


@pytest.mark.parametrize("name", ["resnet-tiny", "vit-tiny"])
@torch.no_grad()
def test_an_image_encoder_saved_to_a_folder_gives_the_same_features_again(name: str, tmp_path: Path) -> None:
    backbone = build_image_backbone(name, 64, 0.0)
    first = ImageEncoder(backbone, 64).eval()
    backbone.save_pretrained(tmp_path)
    second = ImageEncoder(build_image_backbone(str(tmp_path), 64, 0.0), 64).eval()
    if first.pool is not None and second.pool is not None:
        second.pool.load_state_dict(first.pool.state_dict())
    image_B1HW = torch.rand(2, 1, 64, 64) * 2 - 1
    for ours, theirs in zip(first(image_B1HW), second(image_B1HW), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_vit_serves_other_image_sizes_than_it_was_trained_at(tmp_path: Path) -> None:
    build_image_backbone("vit-tiny", 64, 0.0).save_pretrained(tmp_path)
    encoder = ImageEncoder(build_image_backbone(str(tmp_path), 96, 0.0), 96).eval()
    assert encoder(torch.rand(1, 1, 96, 96))[0].shape == (1, 36, encoder.dim)


@torch.no_grad()
def test_a_text_encoder_saved_to_a_folder_gives_the_same_states_again(tmp_path: Path) -> None:
    first = build_text_backbone("bert-tiny", 100, 64, 0.0).eval()
    first.save_pretrained(tmp_path)
    second = build_text_backbone(str(tmp_path), 100, 64, 0.0).eval()
    token_BT = torch.randint(0, 100, (2, 16))
    assert torch.equal(first(token_BT).last_hidden_state, second(token_BT).last_hidden_state)


@pytest.fixture(name="offline")
def fixture_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_wrong_name_is_refused_with_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.image_encoder 'resnet-5' is no preset.*presets: resnet-tiny"):
        build_image_backbone("resnet-5", 64, 0.0)
    with pytest.raises(UserError, match=r"model.text_encoder 'bert-huge' is no preset.*presets: bert-tiny"):
        build_text_backbone("bert-huge", 100, 64, 0.0)
    with pytest.raises(UserError, match=r"model.image_encoder '.*' holds no model"):
        build_image_backbone(str(tmp_path), 64, 0.0)


def test_a_folder_with_a_configuration_and_no_weights_is_refused(tmp_path: Path) -> None:
    build_image_backbone("vit-tiny", 64, 0.0).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.image_encoder '.*' holds no model"):
        build_image_backbone(str(tmp_path), 64, 0.0)


def test_an_encoder_of_the_other_modality_is_refused(tmp_path: Path) -> None:
    build_image_backbone("vit-tiny", 64, 0.0).save_pretrained(tmp_path / "image")
    build_text_backbone("bert-tiny", 100, 64, 0.0).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model.text_encoder .* is a vit; a BERT-like encoder is needed"):
        build_text_backbone(str(tmp_path / "image"), 100, 64, 0.0)
    with pytest.raises(UserError, match=r"model.image_encoder .* is a bert; a ResNet or ViT is needed"):
        build_image_backbone(str(tmp_path / "text"), 64, 0.0)


def test_a_text_encoder_too_small_for_the_reports_is_refused_with_numbers(tmp_path: Path) -> None:
    build_text_backbone("bert-tiny", 100, 64, 0.0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"data.max_tokens 600 .* at most 512"):
        build_text_backbone(str(tmp_path), 100, 600, 0.0)
    with pytest.raises(UserError, match=r"101 entries.* knows 100"):
        build_text_backbone(str(tmp_path), 101, 64, 0.0)
