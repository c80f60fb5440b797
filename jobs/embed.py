"""Embed a corpus's sentences with a trained model: `python jobs/embed.py --embed.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.cli import run_job
from cmcgns.evaluate.config import EmbedJobConfig


def main(config: EmbedJobConfig) -> int:
    """Exit status of an embedding."""
    from cmcgns.evaluate.embed import EmbedJob
    from cmcgns.job import run

    return run(EmbedJob(config))


if __name__ == "__main__":
    sys.exit(run_job(main, EmbedJobConfig, None))
