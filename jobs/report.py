"""Write report.html of pretraining runs: `python jobs/report.py RUN [RUN ...] [--out=FILE]`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("report"))
