"""Cluster embeddings in Parquet: `python jobs/kmeans.py --data.uri=URI [--section.key=value ...]`; see --help."""

import sys

from cmcgns.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("kmeans"))
