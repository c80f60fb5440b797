"""Sweep settings of pretraining: `python jobs/sweep.py [--config FILE.yaml] [--sweep.key=value ...]`; see --help."""

import sys
from pathlib import Path

from cmcgns.cli import run_job
from cmcgns.sweep.config import SweepJobConfig

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "phantom.yaml"


def main(config: SweepJobConfig) -> int:
    """Exit status of a sweep."""
    from cmcgns.job import run
    from cmcgns.sweep.run import SweepJob

    return run(SweepJob(config))


if __name__ == "__main__":
    sys.exit(run_job(main, SweepJobConfig, DEFAULT_CONFIG))
