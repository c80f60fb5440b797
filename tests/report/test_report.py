"""report.html: its curves are the numbers of metrics.jsonl, nothing in it is remote, and no text of a user becomes markup."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cmcgns.commands import main
from cmcgns.errors import UserError
from cmcgns.report.curves import MOST_POINTS, draw, panels
from cmcgns.report.page import report_page, write_report
from cmcgns.report.record import RunRecord, read_record

ATTACK = "<script>alert('x')</script>"


def write_run(folder: Path, steps: int = 12, seed: int = 0, **settings: Any) -> Path:
    """A run folder as pretraining writes it: two stages, a validation at the end of each."""
    random, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for step in range(1, steps + 1):
        stage = 1 if step <= 2 * steps // 3 else 2
        row = {
            "step": step, "stage": stage, "split": "train", "epoch": 0, "learning_rate": 1e-3 / step, "studies_digest": "ab",
            "studies_per_s": 64 + random.random(), "data_wait_s": 0.1, "pool_wait_s": 0.05, "step_s": 0.5,
            "loss": random.random(), "loss_global": random.random(), "gradient_norm": None if step == 2 else random.random(),
        }  # fmt: skip
        rows.append(row | ({"loss_reconstruction": random.random()} if stage == 2 else {}))
        if step in (2 * steps // 3, steps):
            rows.append({
                "step": step, "stage": stage, "split": "val", "step_s": 2.0, "loss": random.random(),
                "i2t_recall_at_1": random.random(), "t2i_recall_at_1": random.random(), "chance_recall_at_1": 0.01, "studies": 64,
            })  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "method": {"name": "cm-cgns"},
                "data": {"uri": "phantom"},
                "train": {"seed": seed},
                "run": {"name": folder.name},
            }
            | settings
        )
    )
    versions = {"torch": "2.13.0", "ray": "2.60.0"}
    (folder / "result.json").write_text(json.dumps({"status": "finished", "studies_seen": 384, "versions": versions}))
    (folder / "bad_rows.jsonl").write_text(
        "".join(
            f'{{"source": "{i}", "reason": "{reason}"}}\n'
            for i, reason in enumerate(["too short", "broken", "too short"])
        )
    )
    Image.fromarray(np.full((8, 8), seed, np.uint8)).save(folder / "reconstruction.png")
    return folder


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, and the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements = list[tuple[str, dict[str, str | None]]]()
        self.rows = list[list[str]]()
        self.words = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = tag in ("td", "th", "br")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells of the one row that begins with ``name``."""
        (found,) = (row[1:] for row in self.rows if row and row[0] == name)
        return found


def page_of(*folders: Path) -> Page:
    return Page(report_page([read_record(str(folder)) for folder in folders]))


def line_values(runs: list[RunRecord], title: str) -> dict[str, tuple[list[float], list[float]]]:
    """What matplotlib draws in the panel ``title``: x and y by the label of the line."""
    for some in panels(runs).values():
        for axis in draw(some).axes:
            if axis.get_title() == title:
                return {
                    str(line.get_label()): tuple(np.asarray(v).tolist() for v in line.get_data()) for line in axis.lines
                }  # type: ignore[misc]
    raise AssertionError(f"no panel {title}")


def test_each_curve_holds_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = read_record(str(folder))
    for key in ("loss", "loss_global", "loss_reconstruction", "studies_per_s", "learning_rate", "gradient_norm"):
        drawn = line_values([record], key)
        of_key = [row for row in rows if row["split"] == "train" and key in row]
        steps, values = drawn["one"]
        assert steps == [row["step"] for row in of_key]
        assert [None if np.isnan(value) else value for value in values] == [row[key] for row in of_key]
    validations = [row for row in rows if row["split"] == "val"]
    assert line_values([record], "loss")["one, validation"] == ([8, 12], [row["loss"] for row in validations])
    recall = line_values([record], "recall_at_1")
    assert recall["one, film to report"] == ([8, 12], [row["i2t_recall_at_1"] for row in validations])
    assert recall["one, report to film"][1] == [row["t2i_recall_at_1"] for row in validations]
    assert recall["one, chance"][1] == [0.01, 0.01]
    assert line_values([record], "share of a step waiting for data")["one"][1] == pytest.approx([0.2] * 12)


def test_every_number_that_a_run_logs_has_a_curve(tmp_path: Path) -> None:
    record = read_record(str(write_run(tmp_path / "one")))
    titles = {panel.title for some in panels([record]).values() for panel in some}
    assert titles == {
        "loss", "loss_global", "loss_reconstruction", "recall_at_1", "studies_per_s", "share of a step waiting for data",
        "share waiting for clustering", "learning_rate", "gradient_norm",
    }  # fmt: skip


def test_a_long_line_shows_means_of_neighbours_and_keeps_the_mean_of_all(tmp_path: Path) -> None:
    steps = 3 * MOST_POINTS
    record = read_record(str(write_run(tmp_path / "long", steps)))
    drawn, values = line_values([record], "loss")["long"], [row["loss"] for row in record.split("train")]
    assert len(drawn[0]) == MOST_POINTS
    assert drawn[0][0] == 2.0  # of the steps 1, 2 and 3
    assert drawn[1][7] == pytest.approx(sum(values[21:24]) / 3)
    assert np.mean(drawn[1]) == pytest.approx(np.mean(values))


def test_nothing_in_the_page_is_remote_and_nothing_runs(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    sources = [attributes["src"] for tag, attributes in page.elements if "src" in attributes]
    assert len(sources) == 4 + 2  # curves, and a reconstruction of each run
    for source in sources:
        assert source is not None
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    for _, attributes in page.elements:
        assert not any(
            name.startswith("on") or name == "href" or "url(" in str(value) for name, value in attributes.items()
        )
    (policy,) = (each["content"] for tag, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_script_in_a_name_a_setting_or_a_failure_is_shown_as_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "named <script>alert(1)<", method={"name": ATTACK}, data={ATTACK: f"${ATTACK}$"})
    (folder / "result.json").write_text(json.dumps({"status": ATTACK, "failure": ATTACK, "versions": {ATTACK: ATTACK}}))
    (folder / "bad_rows.jsonl").write_text(json.dumps({"source": "1", "reason": ATTACK}) + "\n")
    text = report_page([read_record(str(folder))])
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script" not in text
    assert page.row("method") == [ATTACK]
    assert page.row("failure") == [ATTACK]
    assert page.words.count(ATTACK) >= 7
    assert "named <script>alert(1)<" in page.words


def test_the_tables_hold_settings_versions_metrics_and_where_time_went(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1, method={"name": "clip"}))
    assert page.row("torch") == ["2.13.0", "2.13.0"]
    assert page.row("status") == ["finished", "finished"]
    assert page.row("unusable studies") == ["32: too short1: broken"] * 2
    of_both = [row[1:] for row in page.rows if row[0] in ("train.seed", "method.name")]
    assert of_both == [["cm-cgns", "clip"], ["0", "1"]] * 2  # what differs, then all settings
    # 12 steps of 0.5 s, of which 0.1 s and 0.05 s are waits, and two validations of 2 s: 10 s in all
    assert page.row("computing steps") == ["4.2 s, 42 %"] * 2
    assert page.row("waiting for data") == ["1.2 s, 12 %"] * 2
    assert page.row("waiting for clustering") == ["0.6 s, 6 %"] * 2
    assert page.row("validation") == ["4.0 s, 40 %"] * 2
    assert page.row("chance_recall_at_1") == ["0.01", "0.01"]
    assert page.row("run.name") == ["one", "two"]  # once: it always differs


def test_recall_is_explained_and_few_studies_are_a_warning(tmp_path: Path) -> None:
    few, many = write_run(tmp_path / "few"), write_run(tmp_path / "many")
    metrics = few / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"studies": 64', '"studies": 8'))
    page = page_of(few, many)
    words = " ".join(page.words.split())
    assert "few: recall was measured on 8 studies only. One study changes it by 12 percentage points" in words
    assert words.count("studies only") == 1
    for name in ("i2t", "t2i", "parts_recall", "combined_recall"):
        assert re.search(rf"{name}(:| ranks)", words)


def test_a_run_without_recall_has_no_word_on_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "films alone")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("recall", "other").replace('"studies": 64', '"studies": 8'))
    words = page_of(folder).words
    assert "Recall at k" not in words
    assert "studies only" not in words


def test_a_run_that_goes_on_has_a_report_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young")
    for name in ("result.json", "bad_rows.jsonl", "reconstruction.png"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[: len(lines) // 2])  # within a line
    page = page_of(folder)
    assert page.row("status") == ["running, or was killed"]
    assert int(page.row("steps")[0]) < 12


def test_the_command_writes_into_the_run_folder_and_refuses_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one}/report.html\n"
    assert (one / "report.html").read_text().startswith("<!doctype html>")
    assert write_report([f"{one}/", str(two)]) == f"{one}/report-one-two.html"
    assert main(["report", str(one), f"--out={tmp_path}/mine.html"]) == 0
    assert (tmp_path / "mine.html").exists()
    capsys.readouterr()
    (two / "metrics.jsonl").write_text("")
    for wrong, message in (
        (tmp_path, "is not the folder of a pretraining run"),
        (two, "has no step in metrics.jsonl yet"),
    ):
        assert main(["report", str(wrong)]) == 2
        assert re.fullmatch(rf"error: report: .*{message}.*\n", capsys.readouterr().err)
    (two / "metrics.jsonl").write_text('{"iteration": 1}\n')  # of a kmeans job
    with pytest.raises(UserError, match="is not the folder of a pretraining run"):
        read_record(str(two))
