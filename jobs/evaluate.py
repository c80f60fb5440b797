"""Evaluate encoders on downstream tasks: `python jobs/evaluate.py --evaluate.run=RUN_FOLDER ...`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))
