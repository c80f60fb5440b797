"""Embed a corpus's sentences with a trained model: `python jobs/embed.py --embed.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.command_line import run_job
from cmcgns.evaluate.job_config import EmbedJobConfig


def main(config: EmbedJobConfig) -> int:
    """Exit status of an embedding."""
    from cmcgns.evaluate.embed import embed_sentences  # heavy: --help and --print-config need none of it

    return embed_sentences(config)


if __name__ == "__main__":
    sys.exit(run_job(main, EmbedJobConfig, None))
