"""Pretrain a model: `python jobs/pretrain.py [--config FILE.yaml] [--dry-run] [--section.key=value ...]`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("pretrain"))
