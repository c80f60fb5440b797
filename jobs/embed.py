"""Embed a corpus's sentences with a trained model: `python jobs/embed.py --embed.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("embed"))
