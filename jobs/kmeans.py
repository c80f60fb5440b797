"""Cluster embeddings in Parquet: `python jobs/kmeans.py --data.uri=URI [--section.key=value ...]`; see --help."""

import sys

from cmcgns.clustering.job_config import KMeansConfig
from cmcgns.command_line import run_job


def main(config: KMeansConfig) -> int:
    """Exit status of a fit."""
    from cmcgns.clustering.fit import fit_embeddings  # heavy: --help and --print-config need none of it

    return fit_embeddings(config)


if __name__ == "__main__":
    sys.exit(run_job(main, KMeansConfig, None))
