"""What a sweep leaves behind: trials.csv, best.yaml, sweep.png, report.html, and TensorBoard's HParams."""

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cmcgns.command_line import to_yaml
from cmcgns.config import Config, RunConfig
from cmcgns.data import storage
from cmcgns.run_folder import RunFolder
from cmcgns.sweep.ledger import Ledger, Standing, Trial
from cmcgns.sweep.picture import draw
from cmcgns.sweep.space import LEARNT, Space, drawn_settings
from cmcgns.terminal import STYLE


@dataclass(frozen=True)
class Answer:
    """The finalists, best first by the mean over their seeds."""

    standings: list[Standing]
    tests: list[float | None]
    """Each one's metric on the test split; None where the corpus has none."""

    @property
    def winner(self) -> Trial:
        """The trial that best.yaml is."""
        return self.standings[0].trial

    def as_json(self, metric: str) -> dict[str, Any]:
        """For result.json."""
        finalists = [
            {
                "trial": found.trial.number,
                "drawn": found.trial.drawn,
                f"valid_{metric}": found.trial.value,
                "seeds": list(found.values),
                "mean": found.mean,
                "spread": found.spread,
                f"test_{metric}": test,
            }
            for found, test in zip(self.standings, self.tests, strict=True)
        ]
        return {"best": self.winner.number, "finalists": finalists}


def settings_of(base: Config, trial: Trial) -> Config:
    """The settings of a trial, as a run of its own would have them."""
    config = drawn_settings(base, trial.drawn)
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": trial.seed}), "run": RunConfig()})


def table_of(ledger: Ledger, base: Config, metric: str, folder: RunFolder) -> pd.DataFrame:
    """One row a trial, best first: how it went, what it drew, then every other setting."""
    sections = base.model_dump(mode="json", exclude={"run"}).items()
    every = {f"{section}.{key}": value for section, values in sections for key, value in values.items()}
    rungs = sorted({step for trial in ledger.trials for step in trial.values})
    rows = []
    for trial in ledger.trials:
        row: dict[str, Any] = {
            "trial": trial.number,
            "status": trial.status,
            "repeats": trial.repeats,
            metric: trial.value,
            "step": trial.step,
            **{f"{metric}@{step}": trial.values.get(step) for step in rungs},
            "seconds": round(trial.seconds, 1),
            **{f"seconds_{part}": round(seconds, 1) for part, seconds in trial.costs.items()},
            "reason": trial.reason,
            "run": storage.join(folder.uri, f"trials/{trial.folder}"),
            **trial.drawn,
        }
        # what a failed trial drew need not go together: nothing is checked here
        own = {"train.seed": trial.seed} | {other: False for key, other in LEARNT.items() if key in trial.drawn}
        rows.append(row | {key: value for key, value in (every | own).items() if key not in row})
    table = pd.DataFrame(rows)
    return table.sort_values(metric, ascending=False, na_position="last", kind="stable") if rows else table


def write_table(ledger: Ledger, base: Config, metric: str, folder: RunFolder) -> None:
    """trials.csv."""
    table = table_of(ledger, base, metric, folder)
    storage.write_bytes(folder.file("trials.csv"), table.to_csv(index=False).encode())


def write_answer(folder: RunFolder, base: Config, metric: str, space: Space, ledger: Ledger, answer: Answer) -> None:
    """best.yaml, sweep.png, report.html and tensorboard/."""
    storage.write_bytes(folder.file("best.yaml"), to_yaml(settings_of(base, answer.winner)).encode())
    picture = draw(space, ledger, metric)
    storage.write_bytes(folder.file("sweep.png"), picture)
    storage.write_bytes(folder.file("report.html"), page(folder, base, metric, space, ledger, answer, picture).encode())
    with tempfile.TemporaryDirectory(prefix="cmcgns-hparams-") as scratch:
        write_hparams(Path(scratch), ledger, metric)
        storage.upload_folder(Path(scratch), folder.file("tensorboard"))


def page(
    folder: RunFolder, base: Config, metric: str, space: Space, ledger: Ledger, answer: Answer, picture: bytes
) -> str:
    """report.html: the finalists, the picture, and the table of trials, best first."""
    trials = table_of(ledger, base, metric, folder)
    shown = ["trial", "status", "repeats", metric, "step", *space, "seconds", "reason"]
    finalists = pd.DataFrame(
        [
            {
                "trial": found.trial.number,
                f"{metric} (valid)": found.trial.value,
                "mean over seeds": found.mean,
                "spread": found.spread,
                "seeds": len(found.values),
                f"{metric} (test)": test,
            }
            for found, test in zip(answer.standings, answer.tests, strict=True)
        ]
    )
    html = {"index": False, "na_rep": "", "float_format": "{:.4g}".format, "border": 0}
    return "\n".join(
        [
            f"<!doctype html><meta charset='utf-8'><title>{folder.name}</title><style>{STYLE}</style>",
            f"<h1>{folder.name}</h1><p>best: trial {answer.winner.number}; run it with</p>",
            f"<pre>python jobs/pretrain.py --config {folder.file('best.yaml')}</pre>",
            "<h2>Finalists</h2>",
            finalists.to_html(**html),
            f"<p><img src='data:image/png;base64,{base64.b64encode(picture).decode()}' style='max-width:100%'></p>",
            "<h2>Trials</h2>",
            trials[shown].to_html(**html),
        ]
    )


def write_hparams(local: Path, ledger: Ledger, metric: str) -> None:
    """TensorBoard files of all trials, one folder each: settings and metric for HParams, and the metric's curve."""
    from torch.utils.tensorboard import SummaryWriter

    for trial in ledger.trials:
        if trial.value is None:
            continue
        with SummaryWriter(str(local / trial.folder)) as writer:
            writer.add_hparams(
                trial.drawn | {"train.seed": trial.seed}, {f"hparams/{metric}": trial.value}, run_name="."
            )
            for step, value in sorted(trial.values.items()):
                writer.add_scalar(metric, value, step)
