"""PRIOR's three stages against the published classes, whose encoders and decoders are replaced by their ready outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmcgns.config import Config
from cmcgns.data.batch import ImageReportBatch
from cmcgns.methods.cm_cgns.losses import patch_alignment_loss
from cmcgns.methods.cm_cgns.model import ConvolutionalDecoder
from cmcgns.methods.prior import model as prior_model
from cmcgns.methods.prior.matching import matches
from cmcgns.methods.prior.method import Prior, alignment_losses
from cmcgns.methods.prior.model import PriorModel, PriorOutputs, PrototypeBank, rearranged, rows_of
from cmcgns.methods.prior.settings import Settings
from cmcgns.models.attention import AttentionPool, unit
from cmcgns.models.text import sentence_means
from tests.golden import golden
from tests.small import random_batch, small_config

EXACT = {"rtol": 0.0, "atol": 1e-10}
NUMBERS = golden("prior")
COUNTS = NUMBERS["in.sentence_counts"]
MASK_BS = torch.arange(5) < COUNTS.unsqueeze(1)
ROW_N = MASK_BS.flatten().nonzero()[:, 0]
CUT = 7
"""Row of the only sentence beyond the fourth of its report."""
OWN = Settings(
    num_prototypes=7, generated_sentences=4, decoder_layers=1, temperature=0.1, local_temperature=0.1, reconstruct="all",
    same_text="negatives",
)  # fmt: skip
PUBLISHED = {
    "loss_global": "global_alignment_loss", "loss_local_image": "local_image_loss", "loss_local_report": "local_text_loss",
    "loss_prototypes": "proto_loss", "loss_reconstruction": "rec_image_loss", "loss_generation": "spg_loss",
    "loss_consistency": "kl_loss", "loss_prediction": "gpa_loss",
}  # fmt: skip
ALREADY_WEIGHTED = ("loss_prototypes", "loss_generation")


class Ready(nn.Module):
    """Stands for a module whose output is ready."""

    dim, grid, stride, is_convolutional = 16, 3, 4, True

    def __init__(self, *made: Tensor) -> None:
        super().__init__()
        self.made = made

    def forward(self, *_: Any) -> Any:
        return self.made[0] if len(self.made) == 1 else self.made


class ReadyReports(nn.Module):
    """Stands for a text encoder: projected tokens are ready."""

    def __init__(self, token_BTD: Tensor) -> None:
        super().__init__()
        self.token_BTD, self.pool, self.bank = token_BTD, AttentionPool(16), PrototypeBank(7, 16, 0.9)

    def read(self, batch: ImageReportBatch) -> Tensor:
        index_BT = NUMBERS["in.sentence_index"]
        return sentence_means(
            self.token_BTD, torch.where(index_BT > 0, index_BT - 1, -1), batch.sentence_mask_BS.shape[1]
        )


class Stage:
    """Forward and losses of one stage on the golden inputs."""

    def __init__(self, stage: int, own: Settings = OWN) -> None:
        self.leaves = {
            name: NUMBERS[f"in.{name}"].clone().requires_grad_()
            for name in ("patches", "tokens", "global_image", "generated")
        }
        films = Ready(self.leaves["patches"], self.leaves["global_image"])
        reports = ReadyReports(self.leaves["tokens"])
        self.model = PriorModel(films, reports, 16, own, 0.0).double()  # type: ignore[arg-type]
        self.model.image_projection = self.model.patch_projection = nn.Identity()  # type: ignore[assignment]
        self.model.sentence_decoder = Ready(self.leaves["generated"])  # type: ignore[assignment]
        self.model.decoder = Ready(NUMBERS["in.reconstruction"])  # type: ignore[assignment]
        self.model._noise = self.noise  # type: ignore[method-assign]
        self.weights = published_weights(self.model)
        for name, parameter in self.weights.items():
            parameter.data = NUMBERS[name].reshape(parameter.shape).clone()
        self.stage = stage
        self.batch = golden_batch()
        self.outputs: PriorOutputs = self.model(self.batch, stage)
        self.method = Prior(Config.model_construct(objective=own))
        self.losses = self.method.losses(self.outputs, self.batch, {}, stage, 1)

    def noise(self, batch: ImageReportBatch, draw: int) -> Tensor:
        """The published noise; any for a sentence that the published code has cut away."""
        noise_nK = NUMBERS[f"in.gumbel_stage{self.stage}_{draw}"]
        if self.stage == 3:
            noise_nK = torch.cat([noise_nK[:CUT], torch.full((1, 7), 5.0, dtype=torch.float64), noise_nK[CUT:]])
        return noise_nK


def published_weights(model: PriorModel) -> dict[str, nn.Parameter]:
    """Our parameters by their published names."""
    found: dict[str, nn.Parameter] = {
        "w.logit_scale": model.log_scale,
        "w.local_logit_scale": model.local_log_scale,
        "w.sentence_bank.embed.weight": model.text_encoder.bank.weight,
    }
    for name, parameter in model.text_encoder.pool.named_parameters():
        found[f"w.global_text_attention.{name}"] = parameter
    for name, parameter in model.predictor.named_parameters():
        found[f"w.predictor.{name}"] = parameter
    for side, modules in (("1", model.cross_attention.image), ("2", model.cross_attention.text)):
        for role, layer in modules.items():
            for part, parameter in layer.named_parameters():
                found[f"w.local_cross_attention.{role}{side}.{part}"] = parameter
    return found


def golden_batch() -> ImageReportBatch:
    return random_batch(small_config(), slice(0, 4))._replace(
        image_B1HW=NUMBERS["in.image"], sentence_mask_BS=MASK_BS, sentence_row_n=ROW_N,
        sentence_hash_n=NUMBERS["in.sentence_hash"], report_hash_B=torch.arange(4), rank_sentences=(13,),
    )  # fmt: skip


RUNS = {"stage1": (1, "grad1"), "stage2": (2, "grad2"), "stage3": (3, "grad3")}
RUNS["stage3_inverse_permutation"] = (3, "grad3_inverse_permutation")


def release_order(generated_BQD: Tensor, target_BQD: Tensor) -> Tensor:
    """The release takes the solver's columns for the order of generated rows."""
    return matches(generated_BQD, target_BQD).argsort(1)


@pytest.mark.parametrize("published", RUNS)
def test_losses_and_gradients_of_each_stage_are_the_published_ones(
    published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 3 twice: as released, if generated rows are ordered as there, and as ours, with that order inverted."""
    if published == "stage3":
        monkeypatch.setattr(prior_model, "matches", release_order)
    stage, gradients = RUNS[published]
    ran = Stage(stage)
    torch.testing.assert_close(ran.losses.total, NUMBERS[f"{published}.loss"], **EXACT)
    names = ran.method.terms(stage)
    assert list(ran.losses.weighted) == list(names[1:])
    for name, value in zip(names[1:], ran.losses.terms[1:], strict=True):
        weight = 10.0 if name in ALREADY_WEIGHTED else 1.0
        assert float(value) * weight == pytest.approx(float(NUMBERS[f"{published}.{PUBLISHED[name]}"]), rel=1e-6)
        exact = ran.losses.weighted[name] / (10.0 if name == "loss_global" and stage == 3 else 1.0)
        torch.testing.assert_close(exact, NUMBERS[f"{published}.{PUBLISHED[name]}"], **EXACT)
    ran.losses.total.backward()
    theirs = {
        key.removeprefix(f"{gradients}."): each for key, each in NUMBERS.items() if key.startswith(f"{gradients}.")
    }
    assert len(theirs) > 20
    for name, expected in theirs.items():
        found = ran.leaves[name].grad if name in ran.leaves else ran.weights[name].grad
        assert found is not None, name
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-9)
    if published == "stage3":
        outputs = ran.outputs
        assert outputs.generated_BQD is not None
        assert outputs.match_BQ is not None
        rows_BQD = rearranged(outputs.generated_BQD, outputs.match_BQ)
        torch.testing.assert_close(rows_BQD, NUMBERS["mid.generated_rearranged_published"], **EXACT)
        torch.testing.assert_close(outputs.generated_report_BD, unit(NUMBERS["mid.generated_report"]), **EXACT)


@torch.no_grad()
def test_what_lies_between_inputs_and_losses_is_the_published_one() -> None:
    first = Stage(1).outputs
    for name, found in (
        ("sentences", rows_of(first.sentences_BSD, ROW_N)), ("text_to_image", first.text_to_image_BPD),
        ("image_to_text", rows_of(first.image_to_text_BSD, ROW_N)), ("predicted_patches", first.predicted_patches_BPD),
        ("predicted_text_to_image", first.predicted_attended_BPD),
    ):  # fmt: skip
        torch.testing.assert_close(found, NUMBERS[f"mid.{name}"], **EXACT)
    torch.testing.assert_close(first.report_BD, unit(NUMBERS["mid.report_pooled"]), **EXACT)
    second = Stage(2).outputs
    assert second.noisy_nK is not None
    torch.testing.assert_close((second.noisy_nK / 0.9).softmax(1), NUMBERS["mid.stage2_assignment"], **EXACT)
    torch.testing.assert_close(second.picked_nD, NUMBERS["mid.stage2_prototypes"], **EXACT)
    third = Stage(3).outputs
    kept = torch.arange(13) != CUT
    assert third.picked_nD is not None
    torch.testing.assert_close(third.picked_nD[kept], NUMBERS["mid.stage3_prototypes"], **EXACT)
    torch.testing.assert_close(third.report_BD, unit(NUMBERS["mid.stage3_report"]), **EXACT)
    torch.testing.assert_close(third.generated_report_BD, unit(NUMBERS["ref.generated_report"]), **EXACT)
    assert third.kept_BS.sum(1).tolist() == [3, 4, 1, 4]
    assert not third.sentences_BSD[~third.kept_BS].any()


@torch.no_grad()
def test_without_noise_the_bank_gives_what_validation_reads() -> None:
    bank = PrototypeBank(7, 16, 0.9).double()
    bank.weight.data = NUMBERS["w.sentence_bank.embed.weight"]
    picked = bank(NUMBERS["mid.sentences"], None)
    torch.testing.assert_close((picked.noisy_nK / 0.9).softmax(1), NUMBERS["ref.assignment_without_noise"], **EXACT)
    assert torch.equal(picked.noisy_nK, picked.logits_nK)


@torch.no_grad()
def test_ours_inverts_the_solvers_columns_which_the_release_takes_as_they_are() -> None:
    """Its `loss_generation` times 10 is 6.352 instead of 6.063, and its `loss_consistency` 2.578 instead of 1.922."""
    match_BQ = matches(NUMBERS["in.generated"], Stage(3).outputs.sentences_BSD[:, :4])
    assert torch.equal(match_BQ, NUMBERS["mid.hungarian_columns"].argsort(1))
    found = rearranged(NUMBERS["in.generated"], match_BQ)
    torch.testing.assert_close(found, NUMBERS["ref.generated_rearranged"], **EXACT)
    for name, least in (("spg_loss", 0.2), ("kl_loss", 0.5)):
        assert NUMBERS[f"stage3.{name}"] - NUMBERS[f"stage3_inverse_permutation.{name}"] > least


@torch.no_grad()
def test_the_loss_of_sentences_is_that_of_each_report_alone_and_padding_never_matters() -> None:
    ran = Stage(1)
    seen_BSD = ran.outputs.image_to_text_BSD
    losses = []
    for study, count in enumerate(COUNTS.tolist()):
        logits_SS = 10 * unit(ran.outputs.sentences_BSD[study, :count]) @ unit(seen_BSD[study, :count]).T
        label_S = torch.arange(count)
        losses.append((F.cross_entropy(logits_SS, label_S) + F.cross_entropy(logits_SS.T, label_S)) / 2)
    torch.testing.assert_close(torch.stack(losses), NUMBERS["mid.local_text_loss_per_study"], **EXACT)
    assert not losses[2]  # one sentence
    outputs = ran.outputs
    patches = outputs.patches_BPD, outputs.text_to_image_BPD
    predicted = outputs.predicted_patches_BPD, outputs.predicted_attended_BPD
    films = [patch_alignment_loss(*(rows_BPD[[study]] for rows_BPD in (*patches, *predicted))) for study in range(4)]
    torch.testing.assert_close(torch.stack(films), NUMBERS["mid.local_image_loss_per_study"], **EXACT)
    found = alignment_losses(ran.outputs, ran.batch, OWN)["loss_local_report"]
    torch.testing.assert_close(found, torch.stack(losses).mean(), **EXACT)
    rubbish = lambda rows_BSD: F.pad(rows_BSD, (0, 0, 0, 3), value=7.0)
    longer_BS = F.pad(MASK_BS, (0, 3))
    batch = ran.batch._replace(sentence_mask_BS=longer_BS, sentence_row_n=longer_BS.flatten().nonzero()[:, 0])
    outputs = ran.outputs._replace(
        sentences_BSD=rubbish(ran.outputs.sentences_BSD), image_to_text_BSD=rubbish(seen_BSD), kept_BS=longer_BS
    )
    padded = alignment_losses(outputs, batch, OWN)["loss_local_report"]
    torch.testing.assert_close(padded, found, rtol=0, atol=1e-12)


@torch.no_grad()
def test_equal_sentences_of_a_report_leave_each_others_rows_by_default() -> None:
    ran = Stage(1, OWN.model_copy(update={"same_text": "left_out"}))
    found = ran.losses.weighted["loss_local_report"]
    torch.testing.assert_close(found, NUMBERS["ref.local_text_loss_same_text"], **EXACT)
    assert found < NUMBERS["stage1.local_text_loss"]


@torch.no_grad()
def test_the_mean_of_rank_means_is_another_distance_to_prototypes() -> None:
    outputs = Stage(2).outputs
    assert outputs.picked_nD is not None
    distance_n = (outputs.picked_nD - outputs.read_nD).abs().mean(1)
    torch.testing.assert_close(10 * distance_n.mean(), NUMBERS["stage2.proto_loss"], **EXACT)
    halves = torch.stack([distance_n[:8].mean(), distance_n[8:].mean()]).mean()
    torch.testing.assert_close(10 * halves, NUMBERS["defect.proto_loss_two_ranks_published"], **EXACT)


@torch.no_grad()
def test_the_decoder_of_films_gets_each_patch_at_its_place_where_the_release_mixes_them() -> None:
    decoder, seen = ConvolutionalDecoder(16, 3, 4, 16).double(), []
    decoder.entry.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    text_to_image_BPD = Stage(3).outputs.text_to_image_BPD
    decoder(torch.cat([NUMBERS["in.patches"], text_to_image_BPD], dim=-1))
    torch.testing.assert_close(seen[0][:, :16], NUMBERS["ref.patches_as_map"], **EXACT)
    # the release reads (9, 16) numbers as (16, 3, 3)
    assert torch.equal(NUMBERS["in.patches"].reshape(4, 16, 3, 3), NUMBERS["defect.image_map_published"])
    mixed = text_to_image_BPD.reshape(4, 16, 3, 3)
    torch.testing.assert_close(mixed, NUMBERS["defect.text_map_published"], **EXACT)
    assert (mixed - seen[0][:, 16:]).abs().max() > 0.1
