"""Sweep settings of pretraining: `python jobs/sweep.py [--config FILE.yaml] [--sweep.key=value ...]`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("sweep"))
