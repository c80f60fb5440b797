"""Evaluate encoders on downstream tasks: `python jobs/evaluate.py --evaluate.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.command_line import run_job
from cmcgns.evaluate.job_config import EvaluateJobConfig


def main(config: EvaluateJobConfig) -> int:
    """Exit status of an evaluation."""
    # heavy: --help and --print-config need none of it
    if config.evaluate.ablation is not None:
        from cmcgns.evaluate.ablate import ablate

        return ablate(config)
    from cmcgns.evaluate.run import evaluate

    return evaluate(config)


if __name__ == "__main__":
    sys.exit(run_job(main, EvaluateJobConfig, None))
