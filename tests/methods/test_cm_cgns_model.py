"""The whole model: masked patches do not leak, padding has no effect, patches are in raster order."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmcgns.data.batch import Batcher, ImageReportBatch, pad_reports
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.methods.cm_cgns.model import CmCgnsModel
from cmcgns.models.attention import AttentionPool
from cmcgns.models.backbones import ImageEncoder, build_image_backbone
from cmcgns.models.dual_encoder import clamped_scale
from cmcgns.models.presets import IMAGE_PRESETS
from cmcgns.models.text import TextEncoder, sentence_means
from tests.small import losses_of, random_batch, small_config, small_model

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"model__image_encoder": "resnet-tiny", "data__image_size": 96, "data__resize": 104},
}


def model_and_batch(kind: str) -> tuple[CmCgnsModel, ImageReportBatch]:
    config = small_config(**ENCODERS[kind])
    model = small_model(config).eval()
    return model, random_batch(config, slice(0, 4))


class PerturbedEncoder(nn.Module):
    """An image encoder whose patch features are changed where ``where_BP`` is True."""

    def __init__(self, encoder: ImageEncoder, where_BP: Tensor) -> None:
        super().__init__()
        self.encoder, self.where_BP = encoder, where_BP

    def forward(self, image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        features_BPC, pooled_BC = self.encoder(image_B1HW)
        return torch.where(self.where_BP.unsqueeze(-1), torch.randn_like(features_BPC) * 5, features_BPC), pooled_BC


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_a_masked_positions_own_feature_cannot_change_the_reconstruction(kind: str) -> None:
    model, batch = model_and_batch(kind)
    before = model(batch, 2)
    encoder = model.image_encoder
    model.image_encoder = PerturbedEncoder(encoder, before.masked_BP)
    after = model(batch, 2)
    assert not torch.equal(before.patches_BPD, after.patches_BPD)
    assert torch.equal(before.reconstruction_B1HW, after.reconstruction_B1HW)
    model.image_encoder = PerturbedEncoder(encoder, ~before.masked_BP)
    assert not torch.equal(before.reconstruction_B1HW, model(batch, 2).reconstruction_B1HW)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_reconstruction_reaches_both_encoders_and_comes_only_when_asked(kind: str) -> None:
    model, batch = model_and_batch(kind)
    assert model(batch).reconstruction_B1HW is None
    rebuilt_B1HW = model(batch, 2).reconstruction_B1HW
    assert rebuilt_B1HW.shape == batch.image_B1HW.shape
    (rebuilt_B1HW - batch.image_B1HW).abs().mean().backward()
    for part in (model.image_encoder.backbone, model.text_encoder.backbone, model.mask_token):
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        assert any(p.grad is not None and p.grad.any() for p in parameters)


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_a_reconstruction_can_reach_below_zero_and_beyond_every_limit(kind: str) -> None:
    model, batch = model_and_batch(kind)
    decoder = model.decoder
    decoder.exit.bias.fill_(-3.0)
    assert (model(batch, 2).reconstruction_B1HW < -1).any()


@torch.no_grad()
def test_padded_sentences_and_tokens_take_no_part() -> None:
    model, batch = model_and_batch("vit")
    counts_B = batch.sentence_mask_BS.sum(1)
    shortest = int(counts_B.argmin())
    assert counts_B[shortest] < counts_B.max()
    alone = random_batch(small_config(), slice(shortest, shortest + 1))
    together, single = model(batch, 2), model(alone, 2)
    size = int(counts_B[shortest])
    for name in ("image_BD", "report_BD", "patches_BPD", "text_to_image_BPD", "reconstruction_B1HW"):
        # other matrix shapes, another order of float32 sums
        torch.testing.assert_close(getattr(together, name)[shortest], getattr(single, name)[0], rtol=1e-4, atol=1e-5)
    for name in ("sentences_BSD", "image_to_text_BSD"):
        ours, theirs = getattr(together, name)[shortest, :size], getattr(single, name)[0, :size]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_reports_sliced_by_length_give_the_features_and_gradients_of_one_rectangle() -> None:
    config = small_config()
    model = small_model(config).eval().double()
    batch = random_batch(config, slice(0, 37))
    batch = batch._replace(image_B1HW=batch.image_B1HW.double())
    assert len(batch.slice_tokens) == 4
    assert batch.slice_tokens[0] < batch.slice_tokens[-1] == batch.token_BT.shape[1]
    whole = batch._replace(by_length_B=None, slice_tokens=())
    found, expected = [], []
    for each, kept in ((batch, found), (whole, expected)):
        model.zero_grad()
        outputs = model(each)
        (outputs.image_to_text_BSD.square().sum() + outputs.report_BD[:, 0].sum()).backward()
        kept += [outputs.sentences_BSD, outputs.report_BD]
        kept += [parameter.grad for parameter in model.text_encoder.parameters() if parameter.grad is not None]
    assert len(found) > 20
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("device", "passes"), [("cpu", 4), ("cuda", 2)])
def test_a_gpu_reads_reports_in_two_passes_and_a_cpu_in_four(device: str, passes: int) -> None:
    batcher = Batcher(small_config(), 0, torch.device(device))
    tokens = [np.arange(3 + 5 * study, dtype=np.int32) for study in range(64)]
    sentence_of_token = [np.zeros(len(each), np.int16) for each in tokens]
    reports = pad_reports(tokens, sentence_of_token, np.ones(64, np.int64), 0, batcher.most_slices)
    longest = [max(map(len, part)) for part in np.array_split(np.array(tokens, object), passes)]
    assert reports.slice_tokens == tuple(-(-each // 8) * 8 for each in longest)


@torch.no_grad()
def test_a_sentence_is_the_mean_of_its_tokens() -> None:
    token_BTD, owner_BT = (
        torch.randn(2, 9, 4),
        torch.tensor([[-1, 0, 0, 0, 1, 1, 2, -1, -1], [-1, 0, 1, 1, 1, 1, -1, -1, -1]]),
    )
    found_BSD = sentence_means(token_BTD, owner_BT, 3)
    for b in range(2):
        for s in range(3):
            tokens = [token_BTD[b, t] for t in range(9) if owner_BT[b, t] == s]
            expected_D = torch.stack(tokens).mean(0) if tokens else torch.zeros(4)
            torch.testing.assert_close(found_BSD[b, s], expected_D, rtol=0, atol=1e-6)


class MeanColour(nn.Module):
    """A backbone of stride 32 whose channel c at each position is (c + 1) x the mean of its square."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_sizes": [8], "depths": [1]})
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: Tensor) -> Any:
        mean_B1gg = nn.functional.avg_pool2d(pixel_values[:, :1], 32)
        hidden = mean_B1gg * torch.arange(1.0, 9.0, device=pixel_values.device).view(1, 8, 1, 1)
        return type("Found", (), {"last_hidden_state": hidden})


def test_patches_are_permuted_not_viewed_and_in_raster_order() -> None:
    encoder = ImageEncoder(MeanColour(), 96)  # type: ignore[arg-type]
    value_gg = torch.arange(9.0).view(3, 3)
    image_B1HW = value_gg.repeat_interleave(32, 0).repeat_interleave(32, 1)[None, None]
    features_BPC, pooled_BC = encoder(image_B1HW)
    expected_PC = torch.arange(9.0)[:, None] * torch.arange(1.0, 9.0)
    torch.testing.assert_close(features_BPC[0], expected_PC, rtol=0, atol=1e-4)
    assert pooled_BC.shape == (1, 8)


@torch.no_grad()
def test_a_vits_patches_stand_where_its_image_patches_stand() -> None:
    backbone = build_image_backbone("vit-tiny", 64, 0.0).eval()
    backbone.embeddings.position_embeddings.zero_()
    encoder = ImageEncoder(backbone, 64).eval()
    image_B1HW = torch.zeros(1, 1, 64, 64)
    image_B1HW[0, 0, 16:32, 48:64] = 1.0  # row 1, column 3 of 4 x 4
    features_PC = encoder(image_B1HW)[0][0]
    distance_P = (features_PC - features_PC.median(0).values).norm(dim=1)
    assert int(distance_P.argmax()) == 1 * 4 + 3


@pytest.mark.parametrize("kind", ENCODERS)
def test_decoders_put_each_patch_where_it_belongs(kind: str) -> None:
    model, _ = model_and_batch(kind)
    grid, stride = model.image_encoder.grid, model.image_encoder.stride
    joint_BPE = torch.randn(1, grid * grid, 64, requires_grad=True)
    row, column = 0, 1
    middle = (slice(row * stride + stride // 2 - 2, row * stride + stride // 2 + 2),)
    middle += (slice(column * stride + stride // 2 - 2, column * stride + stride // 2 + 2),)
    model.decoder(joint_BPE)[0, 0][middle].sum().backward()
    assert joint_BPE.grad is not None
    # pixels in the middle of a cell depend most on that cell's patch
    assert int(joint_BPE.grad[0].norm(dim=1).argmax()) == row * grid + column


@pytest.mark.parametrize("name", ["resnet-tiny", "resnet-small", "vit-tiny", "vit-small"])
@pytest.mark.parametrize("size", [64, 128])
@torch.no_grad()
def test_presets_work_at_several_image_sizes(name: str, size: int) -> None:
    encoder = ImageEncoder(build_image_backbone(name, size, 0.1), size).eval()
    features_BPC, pooled_BC = encoder(torch.rand(1, 1, size, size) * 2 - 1)
    assert features_BPC.shape == (1, (size // encoder.stride) ** 2, encoder.dim)
    assert pooled_BC.shape == (1, encoder.dim)


def stride_of(preset: str) -> int:
    """The patch of a preset in pixels: the number in its name, else 32 for a ResNet and 16 for a ViT."""
    last = preset.rpartition("-")[2]
    return int(last) if last in ("8", "16") else 32 if preset.startswith("resnet") else 16


def test_the_standard_presets_have_their_published_shapes() -> None:
    with torch.device("meta"):
        encoders = {name: ImageEncoder(build_image_backbone(name, 224, 0.1), 224) for name in IMAGE_PRESETS}
    assert {name: encoder.patches for name, encoder in encoders.items()} == {
        name: (224 // stride_of(name)) ** 2 for name in IMAGE_PRESETS
    }
    assert encoders["resnet-50"].dim == 2 * encoders["resnet-50-16"].dim == 2048
    assert encoders["vit-base"].dim == 768


@pytest.mark.parametrize("kind", ENCODERS)
def test_no_parameter_is_zero_dimensional(kind: str) -> None:
    model, _ = model_and_batch(kind)
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    assert model.log_scale.shape == (1,)


def test_the_decoders_layers_start_from_different_weights() -> None:
    model, _ = model_and_batch("vit")
    first, second = (layer.linear1.weight for layer in model.decoder.layers[:2])
    assert not torch.equal(first, second)


def test_the_scale_starts_at_one_over_the_temperature_and_is_learnt_only_on_request() -> None:
    for learn in (True, False):
        config = small_config(objective__temperature=0.05, objective__learn_temperature=learn)
        model = small_model(config)
        assert float(clamped_scale(model.log_scale.detach())) == pytest.approx(20.0, rel=1e-6)
        assert model.log_scale.requires_grad == learn


def test_the_scale_stops_at_its_limits_and_gradients_pass() -> None:
    for log_scale, scale in ((-3.0, 1.0), (8.0, 100.0), (1.0, 2.718281828)):
        value = torch.tensor([log_scale], requires_grad=True)
        limited = clamped_scale(value)
        limited.backward()
        assert limited.shape == (1,)
        assert float(limited.detach()) == pytest.approx(scale, rel=1e-6)
        assert float(value.grad) == pytest.approx(float(torch.tensor(log_scale).exp()), rel=1e-6)


def test_an_image_size_between_patches_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(UserError, match=r"data.image_size 100 .* patch of 32 pixels; nearest: 96 and 128"):
        ImageEncoder(build_image_backbone("resnet-tiny", 100, 0.0), 100)


def test_fixed_batch_statistics_stay_as_they_are_while_training() -> None:
    config = small_config(**ENCODERS["resnet"], model__fixed_batch_statistics=True)
    for fixed in (config, small_config(**ENCODERS["resnet"])):
        model = small_model(fixed).train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
        model(random_batch(fixed, slice(0, 4)))
        same = all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in before.items())
        assert same == fixed.model.fixed_batch_statistics


@torch.no_grad()
def test_pooling_leaves_out_what_is_masked() -> None:
    pool, parts_BLD = AttentionPool(16, heads=8), torch.randn(1, 5, 16)
    mask_BL = torch.tensor([[True, True, False, True, False]])
    torch.testing.assert_close(pool(parts_BLD, mask_BL), pool(parts_BLD[:, [0, 1, 3]]), rtol=0, atol=1e-6)


def test_text_and_image_meet_in_unit_vectors() -> None:
    model, batch = model_and_batch("vit")
    assert isinstance(model.text_encoder, TextEncoder)
    outputs = model(batch)
    for rows in (outputs.image_BD, outputs.report_BD, outputs.patches_BPD):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_text_encoder_masks_as_transformers_does() -> None:
    model, batch = model_and_batch("vit")
    backbone = model.text_encoder.backbone
    assert not batch.token_mask_BT.all()
    ours = backbone(input_ids=batch.token_BT, attention_mask=model.text_encoder._attention_mask(batch.token_mask_BT))
    theirs = backbone(input_ids=batch.token_BT, attention_mask=batch.token_mask_BT.long())
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_exactly_the_parameters_without_a_gradient_are_not_trained(weight: float, stage: int) -> None:
    config = small_config(objective__local_negatives="films", objective__local_image_weight=weight)
    model, batch = small_model(config), random_batch(config, slice(0, 6))
    losses = losses_of(config, model(batch, stage), batch, None, stage=stage)
    losses.total.backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = load_method(config).frozen(stage)
    assert untrained == {name for name, _ in model.named_parameters() if name.startswith(frozen or ("\0",))}
    assert losses.terms[2] != 0  # the patch loss is logged all the same
