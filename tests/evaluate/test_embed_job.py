"""`jobs/embed.py` as a user runs it: embeds the sentences of a corpus with an exported model."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from cmcgns.cli import to_yaml
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.record import StreamStudy, stream_table, to_block
from cmcgns.data.reports import parse_report
from cmcgns.data.stream import Stream, read_study
from cmcgns.library.runs import open_run
from cmcgns.methods.base import load_method
from cmcgns.methods.cm_cgns.model import CmCgnsModel
from cmcgns.models.attention import unit
from cmcgns.train.checkpoint import export_model
from cmcgns.train.setup import make_tokenizer, open_corpus, sample_reports
from tests.jobs import run_here
from tests.small import small_config


def write_run(folder: Path, config: Config) -> CmCgnsModel:
    """A finished run folder with an untrained model."""
    tokenizer = make_tokenizer(config, sample_reports(open_corpus(config), 1000))
    torch.manual_seed(1)
    model = load_method(config).build_model(tokenizer.vocabulary_size)
    (folder / "export").mkdir(parents=True)
    export_model(folder / "export", model, model.state_dict(), tokenizer, {}, {})
    (folder / "config.yaml").write_text(to_yaml(config))
    return model.eval()


def embed(cwd: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    return run_here(cwd, "embed", *settings, "--embed.cpus_per_worker=0.5")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_every_sentence_of_a_split_comes_out_as_the_model_sees_it(tmp_path: Path) -> None:
    """Two workers over uneven batches, against the model on one study at a time."""
    config = small_config(data__phantom_studies=240)
    model = write_run(tmp_path / "pretrained", config)
    done = embed(tmp_path, "--embed.run=pretrained", "--run.name=e", "--embed.workers=2", "--embed.batch_size=5")
    assert done.returncode == 0, done.stdout + done.stderr
    found = parquet.read_table(tmp_path / "runs" / "e" / "sentences").to_pylist()
    by_id = {row["id"]: row for row in found}

    corpus, run = open_corpus(config), open_run("embed.run", str(tmp_path / "pretrained"))
    studies = corpus.source.index().split("test")
    stream = Stream(corpus.source, None, len(studies), run.tokenizer, config.data, None)
    reader = corpus.source.reader([])
    batcher = Batcher(config, run.tokenizer.pad_id, torch.device("cpu"))
    for study in studies.to_pylist():
        shown = drawn_image(config.data.seed, VALIDATION_EPOCH, study["study_id"], len(study["films"]))
        read = read_study(study, shown, reader, stream, VALIDATION_EPOCH)
        assert isinstance(read, StreamStudy)
        table = stream_table([0], [read], config.data.resize)
        sentences = parse_report(study["report"]).sentences[: len(read.sentence_hashes)]  # those that fit completely
        with torch.no_grad():
            outputs = model(batcher(to_block(table, config.data.resize), (len(sentences),), training=False))
        for number, text in enumerate(sentences):
            embedded = by_id.pop(f"{study['study_id']}/{number}")
            assert (embedded["study_id"], embedded["text"]) == (study["study_id"], text)
            np.testing.assert_allclose(embedded["vector"], unit(outputs.image_to_text_BSD[0, number]), atol=1e-5)
            np.testing.assert_allclose(embedded["sentence_vector"], unit(outputs.sentences_BSD[0, number]), atol=1e-5)
    assert not by_id
    assert len(found) > 100
    result = json.loads((tmp_path / "runs" / "e" / "result.json").read_text())
    assert (result["status"], result["studies"], result["bad_rows"]) == ("finished", len(studies), 0)


def test_what_cannot_be_embedded_is_refused_with_one_message(tmp_path: Path) -> None:
    write_run(tmp_path / "good", small_config())
    (tmp_path / "young" / "export").mkdir(parents=True)
    (tmp_path / "young" / "config.yaml").write_text(to_yaml(small_config()))
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[list[str], str]] = [
        ([], "embed.run is missing"),
        (["--embed.run=nowhere"], "nowhere is not a run folder"),
        (["--embed.run=young"], "has no export: the run has not finished"),
        (["--embed.run=good", "--embed.uri=empty"], "empty: no known format found"),
        (["--embed.run=good", "--embed.splits=test"], "did you mean embed.split?"),
        (["--embed.run=good", "--run.resume=x"], "there is no run of that name"),
    ]
    for settings, message in wrong:
        done = embed(tmp_path, *settings)
        assert done.returncode == 2, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert message in done.stderr, done.stderr
