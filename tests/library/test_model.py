"""The library: embeddings against the network itself, and what it says to wrong input."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydicom.uid import RLELossless

import cmcgns
from cmcgns.data.prepare.check_export import check_files, find_identifiers
from cmcgns.data.reports import parse_report
from cmcgns.library.model import Model
from cmcgns.library.runs import EXPORT_SETTINGS, open_model, portable_settings
from cmcgns.phantom import PhantomCorpus
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import write_hashes
from tests.data.test_dicom import compressed, film, written
from tests.evaluate.test_embed_job import write_run
from tests.jobs import REPOSITORY
from tests.library.conftest import CONFIG
from tests.library.core import WITHOUT_EXTRAS
from tests.small import small_config

PHANTOM = PhantomCorpus(studies=100, seed=3, height=60, width=48)
FILMS = [PHANTOM.render(i) for i in range(7)]
REPORTS = [PHANTOM.study(i).report for i in range(5)]


def seen(film_HW: np.ndarray) -> torch.Tensor:
    """A film of 60 x 48 as the network takes it: 56 x 45 in the middle of a black square, its 48 x 48 in the middle, -1 to 1."""
    import cv2

    assert film_HW.shape == (60, 48)
    square_RR = np.zeros((56, 56), np.uint8)
    square_RR[:, 5:50] = cv2.resize(film_HW, (45, 56), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(square_RR[4:52, 4:52].astype(np.float32) / 127.5 - 1)[None, None]


def png(film_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(film_HW).save(file, "PNG")
    return file.getvalue()


@torch.inference_mode()
def test_films_are_embedded_as_the_network_sees_them_one_by_one(model: Model) -> None:
    lit = [np.maximum(each, 10) for each in FILMS]  # without black borders, which are cut off
    found_ND = model.embed_films(lit)
    for row_D, film_HW in zip(found_ND, lit, strict=True):
        _, expected_1D = model.network.embed_images(seen(film_HW))
        assert row_D == pytest.approx(expected_1D[0].numpy(), abs=1e-5)
    assert np.linalg.norm(found_ND, axis=1) == pytest.approx(1)
    assert found_ND.std(0).max() > 1e-3


def test_black_borders_are_cut_off_as_in_pretraining(model: Model) -> None:
    lit_HW = np.maximum(FILMS[0], 10)
    framed_HW = np.pad(lit_HW, ((3, 20), (12, 0)))
    found_ND = model.embed_films([lit_HW, framed_HW])
    assert found_ND[0] == pytest.approx(found_ND[1], abs=1e-6)


def test_a_film_is_the_same_from_every_source(model: Model, tmp_path: Path) -> None:
    film_HW, path = FILMS[0], tmp_path / "film.png"
    path.write_bytes(png(film_HW))
    colour = Image.fromarray(film_HW).convert("RGB")
    sources: list[Any] = [
        film_HW, path, str(path), png(film_HW), Image.fromarray(film_HW), colour, np.asarray(colour), f"file://{path}",
    ]  # fmt: skip
    found_ND = model.embed_films(sources)
    assert np.abs(found_ND - found_ND[0]).max() < 1e-6


def test_the_embedding_does_not_depend_on_the_batch(run: Path, model: Model) -> None:
    one = cmcgns.load(str(run), batch_size=1)
    assert model.embed_films(FILMS) == pytest.approx(one.embed_films(FILMS), abs=1e-6)
    assert model.embed_reports(REPORTS) == pytest.approx(one.embed_reports(REPORTS), abs=1e-6)
    for by in ("global", "parts", "both"):
        assert model.similarity(FILMS, REPORTS, by) == pytest.approx(one.similarity(FILMS, REPORTS, by), abs=1e-4)


def test_no_films_have_no_embeddings(model: Model) -> None:
    assert model.embed_films([]).shape == (0, 32) == model.embed_reports([]).shape
    assert model.similarity([], REPORTS).shape == (0, 5)
    assert model.similarity(FILMS, [], "parts").shape == (7, 0)


def test_a_short_text_is_one_sentence_and_a_report_its_impression_and_findings(model: Model) -> None:
    found = model.embed_reports(["Cardiomegaly", "cardiomegaly.", "HISTORY: cough.\n\nIMPRESSION: The heart is enlarged.\n",
                                 "The heart is enlarged."])  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[2] == pytest.approx(found[3], abs=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_similarity_is_the_cosine_of_films_and_texts(model: Model) -> None:
    films_ND, texts_TD = model.embed_films(FILMS), model.embed_reports(REPORTS)
    found_NT = model.similarity(FILMS, REPORTS)
    for n, film_D in enumerate(films_ND):
        for t, text_D in enumerate(texts_TD):
            cosine = film_D @ text_D / np.linalg.norm(film_D) / np.linalg.norm(text_D)
            assert found_NT[n, t] == pytest.approx(cosine, abs=1e-6)


@torch.inference_mode()
def test_similarity_by_parts_is_that_of_loops_over_sentences_and_films(model: Model) -> None:
    """Every film with every text in a pass of its own, where similarity goes once over both."""
    score_NT = np.zeros((len(FILMS), len(REPORTS)))
    for n, film_HW in enumerate(FILMS):
        for t, text in enumerate(REPORTS):
            batch = model.batch(list(model._squares([film_HW])), model._read([text]))
            outputs = model.network(batch)
            scores = []
            for s in range(int(batch.sentence_mask_BS.sum())):
                query_D, attended_D = outputs.sentence_query_BSD[0, s], torch.zeros(32)
                for key_D, value_D in zip(outputs.patch_key_BPD[0], outputs.patch_value_BPD[0], strict=True):
                    attended_D = attended_D + torch.sigmoid(query_D @ key_D / 32**0.5) * value_D
                scores.append(torch.nn.functional.cosine_similarity(outputs.sentences_BSD[0, s], attended_D, dim=0))
            score_NT[n, t] = torch.stack(scores).mean()
    score_NT -= score_NT.mean(0)
    assert model.similarity(FILMS, REPORTS, "parts") == pytest.approx(score_NT, abs=1e-5)
    cosine_NT = model.similarity(FILMS, REPORTS)
    both_NT = cosine_NT / cosine_NT.std(ddof=1) + 0.2 * score_NT / score_NT.std(ddof=1)
    assert model.similarity(FILMS, REPORTS, "both") == pytest.approx(both_NT, abs=1e-3)


def test_a_class_score_is_the_mean_of_its_present_sentences_minus_that_of_its_absent_ones(model: Model) -> None:
    present, absent = ["The heart is enlarged.", "There is cardiomegaly."], ["The heart size is normal."]
    found = model.zero_shot(
        FILMS, {"cardiomegaly": {"present": present, "absent": absent}, "mass": {"present": absent}}
    )
    stated, denied = model.similarity(FILMS, present).mean(1), model.similarity(FILMS, absent).mean(1)
    assert found["cardiomegaly"] == pytest.approx(stated - denied, abs=1e-6)
    assert found["mass"] == pytest.approx(denied, abs=1e-6)
    assert list(model.zero_shot(FILMS[:1], "rsna")) == ["pneumonia"]


def test_a_heat_map_is_the_attention_of_each_sentence_of_its_text(model: Model) -> None:
    found = model.heatmap(FILMS[0], REPORTS[0])
    assert found.sentences == parse_report(REPORTS[0]).sentences[: len(found.sentences)]
    assert found.weight_Sgg.shape == (len(found.sentences), 3, 3)
    assert found.film_HW.shape == (48, 48)
    assert found.weight_Sgg.std() > 0
    brightest, picture = np.unravel_index(found.weight_Sgg[0].argmax(), (3, 3)), np.asarray(found.picture(0), float)
    cell = picture[16 * brightest[0] :, 16 * brightest[1] :][:16, :16].sum(2)
    plain = found.film_HW[16 * brightest[0] :, 16 * brightest[1] :][:16, :16]
    added = cell - 3 * 0.55 * plain
    assert added == pytest.approx(0.45 * 255 * sum(cmcgns_magma_top()), abs=2)
    large = np.asarray(found.picture(0, size=480), float)
    assert large.shape == (480, 480, 3)
    assert large.reshape(48, 10, 48, 10, 3).mean((1, 3)) == pytest.approx(picture, abs=40)  # the same, smoother


def cmcgns_magma_top() -> tuple[float, float, float]:
    """The brightest colour of magma, as matplotlib's table ends."""
    return 0.987053, 0.991438, 0.749504


def test_bf16_gives_nearly_the_same_and_rows_of_length_1(run: Path, model: Model) -> None:
    half = cmcgns.load(str(run), precision="bf16")
    for own_ND, wide_ND in (
        (half.embed_films(FILMS), model.embed_films(FILMS)),
        (half.embed_reports(REPORTS), model.embed_reports(REPORTS)),
    ):
        assert own_ND.dtype == np.float32
        assert np.linalg.norm(own_ND, axis=1) == pytest.approx(1)
        assert (own_ND * wide_ND).sum(1).min() > 0.99
        assert not np.array_equal(own_ND, wide_ND)


def test_an_export_alone_gives_the_same_as_its_run(run: Path, model: Model, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "export", tmp_path / "given"))
    for where in (run / "export", alone, f"{alone}/"):
        assert np.array_equal(cmcgns.load(str(where)).embed_films(FILMS), model.embed_films(FILMS))
    (alone / EXPORT_SETTINGS).unlink()
    (alone / EXPORT_HASHES).unlink()
    write_hashes(alone, EXPORT_HASHES)
    with pytest.raises(
        cmcgns.UserError, match=r"has no settings.json: an earlier version wrote it.*cmcgns export RUN OUT"
    ):
        cmcgns.load(str(alone))


def test_the_settings_of_an_export_name_no_place_of_this_machine() -> None:
    config = CONFIG.model_copy(
        update={
            "data": CONFIG.data.model_copy(update={"uri": "s3://hospital/films", "format": "/own/reader.py"}),
            "model": CONFIG.model.model_copy(update={"text_encoder": "/own/bert", "tokenizer": "/own/words"}),
            "clustering": CONFIG.clustering.model_copy(update={"clusterer": "/own/clusterer.py"}),
        }
    )
    text = portable_settings(config)
    assert "hospital" not in text
    assert "/" not in text
    assert json.loads(text)["model"]["text_encoder"] == "bert"


def test_an_export_with_its_settings_passes_the_check_of_exports(run: Path) -> None:
    assert check_files(str(run / "export")) == []
    assert [found for found in find_identifiers(str(run / "export")) if EXPORT_SETTINGS in found.ids] == []


def test_a_module_of_others_is_not_executed_unless_it_is_trusted(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["method"]["name"] = str(tmp_path / "theirs.py")
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "theirs.py").write_text("raise SystemExit('executed')")
    with pytest.raises(
        cmcgns.UserError, match=r"theirs.py \(method.name\), which would be executed here.*set trusted=\["
    ):
        cmcgns.load(str(other))
    with pytest.raises(SystemExit, match="executed"):
        cmcgns.load(str(other), trusted=[str(tmp_path / "theirs.py")])


@pytest.mark.parametrize(
    ("films", "message"),
    [
        (["There is no effusion."], r"film 0 is a text of 21 characters and not the path of a file"),
        (["An effusion. " * 400], r"film 0 is a text of 5200 characters and not the path of a file"),
        (["An effusion, see http://host/case."], r"film 0 is a text of 34 characters and not the path of a file"),
        (["An effusion\0."], r"film 0 is a text of 13 characters and not the path of a file"),
        (["An effusion/edema."], r"film 0 is a text of 18 characters and not the path of a file"),
        ([FILMS[0], "/no/such.png"], r"film 1 \(/no/such.png\) is not a file; check the path"),
        ([FILMS[0], png(FILMS[0])[:300]], r"film 1 cannot be used: film file is truncated or broken"),
        ([b""], r"film 0 cannot be used: film file is empty"),
        ([b"GIF89a"], "film 0 cannot be used: film file is neither JPEG"),
        ([np.zeros((2, 3, 4, 5))], r"film 0 cannot be used: an array of shape \(2, 3, 4, 5\) is no film"),
        ([np.full((9, 9), np.nan)], "film 0 cannot be used: film has values that are not finite"),
        ([np.zeros((9, 9), bool)], "film 0 cannot be used: an array of bool"),
        ([7], "film 0 is of type int; give a path"),
        ("film.png", "got one str; give a list of films"),
        (FILMS[0], "got one ndarray; give a list of films"),
    ],
)
def test_films_that_cannot_be_used_are_named_by_their_number(model: Model, films: Any, message: str) -> None:
    with pytest.raises(cmcgns.UserError, match=message) as error:
        model.embed_films(films)
    assert "effusion" not in str(error.value)  # a report is never quoted


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["The heart is enlarged.", "film.png"], "text 1 is the name of a film"),
        ([FILMS[0]], "text 0 is of type ndarray; give a string. Films go to embed_films"),
        (["..."], "text 0 has no word"),
        (["A large effusion. " * 2, "very " * 200], "text 1 cannot be used: first sentence of the report does not fit"),
        ("The heart is enlarged.", "got one text; give a list of texts"),
    ],
)
def test_texts_that_cannot_be_used_are_named_by_their_number(model: Model, texts: Any, message: str) -> None:
    with pytest.raises(cmcgns.UserError, match=message) as error:
        model.embed_reports(texts)
    assert "enlarged" not in str(error.value)


def test_wrong_ways_of_asking_have_one_message_with_the_fix(run: Path, model: Model, tmp_path: Path) -> None:
    wrong = [
        (lambda: cmcgns.load(f"{tmp_path}/none"), "none does not exist; give the folder of a finished run"),
        (lambda: cmcgns.load(str(tmp_path)), "is not a run folder: it has no config.yaml"),
        (lambda: cmcgns.load(str(run), device="gpu"), "device 'gpu': choose cpu, cuda or cuda:NUMBER"),
        (lambda: cmcgns.load(str(run), device="cuda:99"), "CUDA devices; choose another, or cpu"),
        (lambda: cmcgns.load(str(run), precision="fp16"), "precision 'fp16': choose fp32 or bf16"),
        (lambda: cmcgns.load(str(run), batch_size=0), "batch_size 0: give at least 1"),
        (lambda: model.similarity(FILMS, REPORTS, "words"), "by 'words': choose global, parts or both"),
        (lambda: model.similarity(FILMS[:1], REPORTS, "parts"), "compares films with each other: give at least two"),
        (lambda: model.zero_shot(FILMS, "padchest"), "prompts 'padchest': there are built-in ones for phantom"),
        (lambda: model.zero_shot(FILMS, {"mass": ["A mass."]}), "prompts: mass needs sentences under `present`"),
        (
            lambda: model.zero_shot(FILMS, {"mass": {"present": ["very " * 200]}}),
            "a sentence of mass cannot be used: first sent",
        ),
    ]
    for ask, message in wrong:
        with pytest.raises(cmcgns.UserError) as error:
            ask()
        assert message in str(error.value)


def test_a_method_without_attention_or_parts_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", small_config(method__name="infonce"))
    plain = cmcgns.load(str(tmp_path / "plain"))
    assert plain.embed_films(FILMS).shape == (7, 32)
    with pytest.raises(cmcgns.UserError, match="method infonce attends to no patches"):
        plain.heatmap(FILMS[0], REPORTS[0])
    with pytest.raises(cmcgns.UserError, match="method infonce compares no parts of films; choose by='global'"):
        plain.similarity(FILMS, REPORTS, "both")


def test_long_work_shows_its_progress_in_a_terminal_unless_told_not_to(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    for progress, batch_size, shown in ((True, 2, True), (True, 32, False), (False, 2, False)):
        model = cmcgns.load(str(run), progress=progress, batch_size=batch_size)
        capsys.readouterr()
        model.embed_films(FILMS)
        assert ("films" in capsys.readouterr().err) == shown


USER_SCRIPT = f"""
{WITHOUT_EXTRAS}
import cmcgns
assert "torch" not in sys.modules
print("script")
model = cmcgns.load(sys.argv[1])
films = model.embed_films([open(path, "rb").read() for path in sys.argv[2:]])
texts = model.embed_reports(["The heart is enlarged.", "No effusion."])
print(films.shape, (films @ texts.T).shape, len(model.zero_shot(sys.argv[2:], "nih")))
print(model.similarity(sys.argv[2:], ["The heart is enlarged."], "both").shape)
print(model.heatmap(sys.argv[2], "The heart is enlarged.").weight_Sgg.shape)
"""


def test_a_script_without_a_guard_uses_a_model_where_neither_ray_nor_deepspeed_nor_faiss_is(
    run: Path, tmp_path: Path
) -> None:
    """A compressed DICOM is decoded in a child process, which must not run the script again."""
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    (tmp_path / "a.dcm").write_bytes(written(compressed(RLELossless)))
    (tmp_path / "b.dcm").write_bytes(written(film()))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(run), str(tmp_path / "a.dcm"), str(tmp_path / "b.dcm")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["script", "(2, 32) (2, 2) 14", "(2, 1)", "(1, 3, 3)"]


def test_a_damaged_export_is_refused(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "export", tmp_path / "given"))
    heads = alone / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\1")
    with pytest.raises(cmcgns.UserError, match=r"is damaged: heads.safetensors is not what was written"):
        open_model("cmcgns.load", str(alone))
