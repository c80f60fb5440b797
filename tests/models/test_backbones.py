"""Encoders by preset, folder or name, and the message if there is none."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SwinConfig,
)

from cmcgns.errors import UserError
from cmcgns.models.backbones import ImageEncoder, build_image_backbone, build_text_backbone, read_layout


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


@pytest.mark.parametrize("name", ["resnet-tiny-16", "vit-tiny"])
def test_channels_last_changes_neither_features_nor_gradients(name: str) -> None:
    backbone, image_B1HW = build_image_backbone(name, 64, 0.0), torch.rand(4, 1, 64, 64) * 2 - 1
    torch.manual_seed(0)
    usual = ImageEncoder(backbone, 64).double()
    torch.manual_seed(0)
    last = ImageEncoder(deepcopy(backbone), 64, channels_last=True).double()
    for encoder in (usual, last):
        for rows in (found := encoder(image_B1HW)):
            rows.square().sum().backward(retain_graph=rows is found[0])
    torch.testing.assert_close(last(image_B1HW), usual(image_B1HW))
    for ours, theirs in zip(last.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    pixels_B3HW = torch.rand(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    hidden = last.backbone(pixel_values=pixels_B3HW)
    if last.is_convolutional:  # the format goes through to the end
        assert hidden.last_hidden_state.is_contiguous(memory_format=torch.channels_last)


SMALL = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4}
OTHERS = {
    # model, (C, stride, tokens before the patches)
    "convnext": (ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32]), (32, 32, 0)),
    "three-stage resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic"), (32, 16, 0),
    ),
    "dinov2": (Dinov2Config(**SMALL, image_size=518), (48, 14, 1)),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**SMALL, patch_size=14), (48, 14, 5)),
    "deit": (DeiTConfig(**SMALL), (48, 16, 2)),
    "swin": (SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2]), (64, 32, 0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_grid_stride_and_width_are_read_off_the_model(kind: str, tmp_path: Path) -> None:
    config, (dim, stride, prefix) = OTHERS[kind]
    AutoModel.from_config(config).save_pretrained(tmp_path)
    side = 7 * stride
    encoder = ImageEncoder(build_image_backbone(str(tmp_path), side, 0.0), side).eval()
    assert read_layout(encoder.backbone)[:3] == (dim, stride, prefix)
    image_B1HW = torch.rand(2, 1, side, side)
    features_BPC, pooled_BC = encoder(image_B1HW)
    assert (features_BPC.shape, pooled_BC.shape) == ((2, 49, dim), (2, dim))
    # patches are in raster order: a bright corner changes the last one most
    image_B1HW[:, :, -stride:, -stride:] = 8.0
    moved_BP = (encoder(image_B1HW)[0] - features_BPC).norm(dim=-1)
    assert moved_BP.argmax(1).tolist() == [48, 48]


def test_an_image_size_that_cuts_a_patch_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data.image_size 100 .* patch of 32 pixels; nearest: 96 and 128"):
        ImageEncoder(build_image_backbone("resnet-tiny", 100, 0.0), 100)


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
    with pytest.raises(UserError, match=r"model.image_encoder 'resnet-5' is neither a preset.*presets: resnet-tiny"):
        build_image_backbone("resnet-5", 64, 0.0)
    with pytest.raises(UserError, match=r"model.text_encoder 'bert-huge' is neither a preset.*presets: bert-tiny"):
        build_text_backbone("bert-huge", 100, 64, 0.0)
    with pytest.raises(UserError, match=r"model.image_encoder '.*' contains no model"):
        build_image_backbone(str(tmp_path), 64, 0.0)


def test_a_folder_with_a_configuration_and_no_weights_is_refused(tmp_path: Path) -> None:
    build_image_backbone("vit-tiny", 64, 0.0).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.image_encoder '.*' contains no model"):
        build_image_backbone(str(tmp_path), 64, 0.0)


def test_an_encoder_of_the_other_modality_is_refused(tmp_path: Path) -> None:
    build_image_backbone("vit-tiny", 64, 0.0).save_pretrained(tmp_path / "image")
    build_text_backbone("bert-tiny", 100, 64, 0.0).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model.text_encoder .* is a vit; give a BERT-like encoder"):
        build_text_backbone(str(tmp_path / "image"), 100, 64, 0.0)
    with pytest.raises(UserError, match=r"model.image_encoder .* is a bert; give an image model"):
        build_image_backbone(str(tmp_path / "text"), 64, 0.0)


def test_a_text_encoder_too_small_for_the_reports_is_refused_with_numbers(tmp_path: Path) -> None:
    build_text_backbone("bert-tiny", 100, 64, 0.0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"data.max_tokens 600 .* at most 512"):
        build_text_backbone(str(tmp_path), 100, 600, 0.0)
    with pytest.raises(UserError, match=r"101 entries.* has 100"):
        build_text_backbone(str(tmp_path), 101, 64, 0.0)
