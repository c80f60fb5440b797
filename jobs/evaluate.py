"""Evaluate encoders on downstream tasks: `python jobs/evaluate.py --evaluate.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.cli import run_job
from cmcgns.evaluate.config import EvaluateJobConfig


def main(config: EvaluateJobConfig) -> int:
    """Exit status of an evaluation."""
    # imported here: slow, and --help and --print-config do not need it
    from cmcgns.job import run

    if config.evaluate.ablation is not None:
        from cmcgns.evaluate.ablation import AblationJob

        return run(AblationJob(config))
    from cmcgns.evaluate.run import EvaluateJob

    return run(EvaluateJob(config))


if __name__ == "__main__":
    sys.exit(run_job(main, EvaluateJobConfig, None))
