"""Convert a raw corpus to shards: `python jobs/prepare.py --data.uri=RAW --prepare.out=URI ...`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("prepare"))
