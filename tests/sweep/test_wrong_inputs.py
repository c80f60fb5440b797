"""Invalid input of a sweep ends with status 2 and one message that names it, before Ray starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cmcgns.cli import run_job
from cmcgns.errors import UserError
from cmcgns.job import run
from cmcgns.sweep.config import SweepJobConfig
from cmcgns.sweep.run import SweepJob
from cmcgns.sweep.setup import check_metric
from tests.jobs import REPOSITORY, TINY
from tests.small import small_config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep.space={objective.mask_ration: {uniform: [0.2, 0.8]}}"], "did you mean objective.mask_ratio?"),
        (["--sweep.space={objective.mask_ratio: {uniform: [0.8, 0.2]}}"], "uniform from 0.8 to 0.2 is empty"),
        (["--sweep.space={objective.mask_ratio: {uniform: [0.2, 1.2]}}"], "objective.mask_ratio = 1.2 must be"),
        (["--sweep.space={objective.mask_ratio: {choice: []}}"], "choice needs a list of values, not []"),
        (["--sweep.space={objective.mask_ratio: 0.5}"], "0.5 is not a range"),
        (["--sweep.space={train.num_workers: {choice: [1, 2]}}"], "the same for all trials"),
        (["--sweep.space={}"], "sweep.space is empty"),
        (["--sweep.metric=accuracy"], "sweep.metric accuracy is not reported; choose one of mean_recall_at_1"),
        (["--sweep.metric=loss"], "losses are not comparable"),
        (["--train.min_workers=1"], "train.min_workers: trials of a sweep have train.num_workers each; leave it out"),
        (["--sweep.trials=0"], "sweep.trials = 0 must be more than 0"),
        (["--sweep.trial=4"], "did you mean sweep.trials?"),
        (["--sweep.search=grid"], "sweep.search grid accepts no ranges, and objective.mask_ratio is one"),
        (["--sweep.resume=gone"], "sweep.resume gone: there is no run of that name"),
        (["--run.resume=some"], "resume a sweep with --sweep.resume=<name>"),
        (
            ["--objective.num_clusters=512", "--sweep.space={objective.mask_ratio: {uniform: [0.2, 0.8]}}"],
            "objective.num_clusters 512 needs at least 4 x 512",
        ),
        (["--sweep.space={data.views: {choice: [[PA], [PA, AP]]}}"], "choice takes numbers, strings, true and false"),
        (["--sweep.space={train.validate_every: {choice: [5, 10]}}"], "the same for all trials"),
        (["--train.warmup_steps=30"], "a warm-up of 30 steps does not fit"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_message(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", str(TINY), f"--run.storage={tmp_path}", "--data.phantom_studies=130", *arguments]
    assert run_job(lambda config: run(SweepJob(config)), SweepJobConfig, None, given) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert words in said.err
    assert not said.out
    assert not any(tmp_path.iterdir())
    assert not ray.is_initialized()


def test_a_metric_that_the_method_does_not_report_is_refused_before_a_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method.name=infonce", "--train.stage2_steps=0", "--sweep.metric=mean_parts_recall_at_1"]
    given = ["--config", str(TINY), f"--run.storage={tmp_path}", *given]
    assert run_job(lambda config: run(SweepJob(config)), SweepJobConfig, None, given) == 2
    # the line before says which keys of the file do not apply to the method
    assert capsys.readouterr().err.splitlines()[1:] == [
        "error: sweep.metric mean_parts_recall_at_1 is not reported by this method, which compares no sentences with films; "
        "choose mean_recall_at_1"
    ]
    assert not any(tmp_path.iterdir())


def test_help_needs_no_heavy_modules() -> None:
    code = "import runpy, sys; sys.argv = ['jobs/sweep.py', '--help']\n"
    code += "try: runpy.run_path('jobs/sweep.py', run_name='__main__')\n"
    code += "finally: assert not {'ray', 'torch', 'pyarrow', 'optuna'} & set(sys.modules), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sweep.first_rung" in done.stdout


def test_films_without_reports_cannot_be_swept_by_recall() -> None:
    base = small_config(method__name="images100m", data__reports=False)
    with pytest.raises(
        UserError, match=r"sweep\.metric mean_recall_at_1 compares films with reports, and data\.reports is false"
    ):
        check_metric("mean_recall_at_1", base)
