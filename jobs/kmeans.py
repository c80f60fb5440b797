"""Cluster embeddings in Parquet: `python jobs/kmeans.py --data.uri=URI [--section.key=value ...]`; see --help."""

import sys

from cmcgns.cli import run_job
from cmcgns.clustering.config import KMeansConfig


def main(config: KMeansConfig) -> int:
    """Exit status of a fit."""
    from cmcgns.clustering.fit import KMeansJob
    from cmcgns.job import run

    return run(KMeansJob(config))


if __name__ == "__main__":
    sys.exit(run_job(main, KMeansConfig, None))
