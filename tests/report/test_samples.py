"""Films and sentences in report.html: what the model makes of validation studies, and none of a hospital unless asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cmcgns
from cmcgns.commands import main
from cmcgns.config import Config
from cmcgns.data.image import Target
from cmcgns.data.order import VALIDATION_EPOCH, drawn_image
from cmcgns.data.readers import open_index
from cmcgns.data.tokenizer import ReportTokenizer
from cmcgns.models.attention import unit
from cmcgns.phantom import PhantomCorpus
from cmcgns.report.page import report_page, with_samples
from cmcgns.report.record import read_record
from cmcgns.report.samples import Samples, read_samples
from cmcgns.train.checkpoint import export_model
from tests.evaluate import test_embed_job
from tests.library.conftest import CONFIG
from tests.report.test_report import Page, write_run
from tests.small import small_config

MOST = 20
K = CONFIG.banks[0].num_clusters


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with metrics, pictures, the export of an untrained model, and centroids that were drawn."""
    folder = write_run(tmp_path_factory.mktemp("samples") / "finished")
    return with_centroids(folder, CONFIG)


def with_centroids(folder: Path, config: Config) -> Path:
    """Write the export of an untrained model into ``folder``, and drawn centroids for every bank of its method."""
    model = test_embed_job.write_run(folder, config)
    state = dict[str, torch.Tensor]()
    for number, bank in enumerate(config.banks):
        prefix = f"{bank.name}/" if number else ""
        drawn_KD = torch.randn(bank.num_clusters, bank.dim, generator=torch.Generator().manual_seed(number))
        state[f"{prefix}rows_KD"], state[f"{prefix}counts_K"] = unit(drawn_KD), torch.ones(bank.num_clusters)
        state[f"{prefix}version_and_start"] = torch.tensor([3, 300])
    tokenizer: ReportTokenizer = cmcgns.load(str(folder)).run.tokenizer
    shutil.rmtree(folder / "export")
    (folder / "export").mkdir()
    export_model(folder / "export", model, model.state_dict(), tokenizer, {"format": 2}, state)
    return folder


@pytest.fixture(scope="module")
def samples(finished: Path) -> Samples:
    return read_samples(str(finished), MOST)


class Truth:
    """The first validation studies of the phantom, straight from it: reports, films and their embeddings."""

    def __init__(self, folder: Path) -> None:
        data, self.model = CONFIG.data, cmcgns.load(str(folder))
        corpus = PhantomCorpus(data.phantom_studies, data.seed, data.phantom_size, data.phantom_size)
        every = [corpus.study(i) for i in range(data.phantom_studies)]
        number_of = {study.study_id: i for i, study in enumerate(every) if study.split == "valid"}
        source, index = open_index("data.uri", data, Target(data.resize, "longer"))
        in_order, _ = source.arrange(index.split("valid"), data.group_studies)
        numbers = [number_of[study_id] for study_id in in_order["study_id"].to_pylist()][:MOST]
        self.reports = [every[i].report for i in numbers]
        shown = [drawn_image(data.seed, VALIDATION_EPOCH, every[i].study_id, len(every[i].films)) for i in numbers]
        self.films = [corpus.render(i, film) for i, film in zip(numbers, shown, strict=True)]
        self.cosine_NN = self.model.embed_films(self.films) @ self.model.embed_reports(self.reports).T
        read = self.model._read(self.reports)
        self.words = [parsed.sentences[: encoded.sentences] for parsed, encoded in read]

    def seen(self, study: int) -> np.ndarray:
        """The film of a study as the model sees it."""
        return self.model.seen(next(self.model._squares([self.films[study]])))


@pytest.fixture(scope="module")
def truth(finished: Path) -> Truth:
    return Truth(finished)


def test_queries_find_what_the_library_says(samples: Samples, truth: Truth) -> None:
    assert samples.studies == len(truth.reports) >= 8
    last = len(truth.reports) - 1
    for found, cosine_NN in ((samples.films, truth.cosine_NN), (samples.reports, truth.cosine_NN.T)):
        assert len(found) == 4
        for query, row in ((found[0], 0), (found[-1], last)):
            order = np.argsort(-cosine_NN[row])
            assert [each.cosine for each in query.nearest] == pytest.approx(cosine_NN[row, order[:3]], abs=1e-5)
            assert [each.sentences for each in query.nearest] == [truth.words[i] for i in order[:3]]
            right = [i for i in order if truth.words[i] == truth.words[row]]
            assert query.rank == list(order).index(right[0]) + 1
            assert [each.is_right for each in query.nearest] == [i in right for i in order[:3]]
            assert np.array_equal(query.film, truth.seen(row))
            assert np.array_equal(query.nearest[0].film, truth.seen(order[0]))


def test_heat_maps_are_those_of_the_library_for_the_rarest_sentences(samples: Samples, truth: Truth) -> None:
    first = samples.heats[0]
    heatmap = truth.model.heatmap(truth.films[0], truth.reports[0])
    number = heatmap.sentences.index(first.sentence)
    assert np.array_equal(first.heat, heatmap.picture(number))
    common = lambda sentence: sum(sentence in words for words in truth.words)
    assert common(first.sentence) <= sorted(map(common, truth.words[0]))[1]


def test_clusters_show_the_rows_nearest_to_their_centroids(samples: Samples, truth: Truth) -> None:
    """Rows of CM-CGNS are the sentences' attended features, one study at a time."""
    centroids = torch.nn.functional.normalize(torch.randn(K, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows, owners = list[np.ndarray](), list[tuple[int, str]]()
    for study, (film, report) in enumerate(zip(truth.films, truth.reports, strict=True)):
        with torch.no_grad():
            outputs = truth.model.network(
                truth.model.batch(list(truth.model._squares([film])), truth.model._read([report]))
            )
        for number, sentence in enumerate(truth.words[study]):
            rows.append(unit(outputs.image_to_text_BSD[0, number]).numpy())
            owners.append((study, sentence))
    cosine_nK = np.stack(rows) @ centroids.numpy().T
    nearest_n = cosine_nK.argmax(1)
    (found,) = samples.clusters.values()
    assert [each.share for each in found] == sorted((each.share for each in found), reverse=True)
    for cluster in found:
        own = np.flatnonzero(nearest_n == cluster.number)
        assert cluster.share == pytest.approx(len(own) / len(nearest_n))
        best = own[cosine_nK[own, cluster.number].argmax()]
        assert cluster.sentences[0][1] == pytest.approx(float(cosine_nK[best, cluster.number]), abs=1e-5)
        near = [owners[i] for i in own if cosine_nK[i, cluster.number] > cluster.sentences[0][1] - 1e-5]
        assert cluster.sentences[0][0] in [sentence for _, sentence in near]
        assert any(np.array_equal(cluster.films[0], truth.seen(study)) for study, _ in near)


@pytest.mark.parametrize(
    "method",
    [
        {"method__name": "xdc"},
        {"method__name": "mgca", "objective__prototype_source": "pool", "objective__num_prototypes": 6},
        {
            "method__name": "images100m", "objective__codes": "kmeans", "objective__prototypes": 6, "objective__embed": 32,
            "objective__supervision": "reports",
        },
    ],
    ids=["two banks", "films and reports in one bank", "views of films"],
)  # fmt: skip
def test_clusters_of_other_banks_are_shown(tmp_path: Path, method: dict[str, object]) -> None:
    config = small_config(**method)
    found = read_samples(str(with_centroids(tmp_path / "run", config)), MOST)
    assert list(found.clusters) == [bank.name for bank in config.banks]
    assert all(sum(each.share for each in clusters) == pytest.approx(1) for clusters in found.clusters.values())


def test_a_hospital_that_calls_its_folder_phantom_is_no_generated_corpus(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "hospital"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("format: auto\n", "format: pairs-csv\n"))
    assert read_record(str(finished)).is_generated
    assert not read_record(str(folder)).is_generated


def test_a_module_that_is_not_trusted_is_named_with_the_option_that_executes_it(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "own"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("format: auto\n", "format: hospital.reader\n"))
    (left_out,) = read_samples(str(folder), MOST).left_out
    assert "names the module hospital.reader (data.format)" in left_out
    assert left_out.endswith("if you trust it, set --trusted=hospital.reader")


def test_the_page_of_a_generated_corpus_shows_them_without_being_asked(finished: Path, tmp_path: Path) -> None:
    assert main(["report", str(finished), f"--out={tmp_path}/report.html"]) == 0
    page = Page((tmp_path / "report.html").read_text())
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    # curves, a reconstruction, two tables of four queries, eight heat maps, three films of each cluster at most
    assert len(sources) > 4 + 1 + 4 + 12 + 2 * 8
    assert "Where sentences look" in page.words
    assert "may see them" not in page.words
    assert "as the model reads them, in lower case and without commas" in " ".join(page.words.split())


def test_a_page_holds_no_film_and_no_sentence_of_a_hospital_unless_asked_for(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "hospital"))
    text = (folder / "config.yaml").read_text()
    assert "uri: phantom\n" in text
    (folder / "config.yaml").write_text(text.replace("uri: phantom\n", "uri: /data/films\n"))
    page = Page(report_page([with_samples(read_record(str(folder)))]))
    left_out = "left out: all films and sentences: the corpus may be of patients; "
    assert page.words.count(f"{left_out}cmcgns report {folder} --samples=128 shows them") == 1
    assert not any("film" in str(attributes.get("alt")) for tag, attributes in page.elements if tag == "img")
    assert "reconstruction.png" not in page.words
    shown = Page(report_page([with_samples(read_record(str(folder)), 8)]))
    assert "reconstruction.png" in shown.words
    assert "Give it only to people who may see them" in shown.words
    # the corpus is not there: what cannot be had is said
    assert "left out: retrieval, heat maps and clusters: data.uri /data/films" in shown.words


def test_what_cannot_be_shown_says_why(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = Path(shutil.copytree(finished, tmp_path / "young"))
    (young / "export" / "centroids.safetensors").unlink()
    (young / "export" / "hashes.json").unlink()
    record = read_record(str(young))
    assert "hashes.json is missing" in with_samples(record).left_out[0]
    shutil.rmtree(young / "export")
    assert "has no export: the run has not finished" in with_samples(record).left_out[0]
    assert main(["report", str(finished), "--samples=-1"]) == 2
    assert capsys.readouterr().err.startswith("error: report: --samples -1 is below 0; give a number")
