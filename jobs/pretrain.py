"""Pretrain a model: `python jobs/pretrain.py [--config FILE.yaml] [--dry-run] [--section.key=value ...]`; see --help."""

import sys
from pathlib import Path

from cmcgns.cli import run_job
from cmcgns.config import Config

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "phantom.yaml"


def main(config: Config) -> int:
    """Exit status of a pretraining run."""
    from cmcgns.job import run
    from cmcgns.train.run import PretrainJob

    return run(PretrainJob(config))


def plan(config: Config) -> int:
    """Exit status of a dry run: 0 if the run could start."""
    from cmcgns.job import run
    from cmcgns.train.run import PretrainJob

    return run(PretrainJob(config, dry_run=True), dry_run=True)


if __name__ == "__main__":
    sys.exit(run_job(main, Config, DEFAULT_CONFIG, plan=plan))
