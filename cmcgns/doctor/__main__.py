"""Checks a machine or a running cluster before hours are spent: `python -m cmcgns.doctor [--section.key=value ...]`; see --help.

With RAY_ADDRESS in the environment, as in a submitted job, it looks at that cluster (RAY_ADDRESS=auto: the one that this machine
belongs to), else at this machine alone. It takes the settings of the pretraining run that is to come.
"""

import sys

from cmcgns.command_line import run_job
from cmcgns.doctor.job_config import DoctorJobConfig


def main(config: DoctorJobConfig) -> int:
    """Exit status of a visit."""
    from cmcgns.doctor.run import diagnose  # heavy: --help and --print-config need none of it

    return diagnose(config)


if __name__ == "__main__":
    sys.exit(run_job(main, DoctorJobConfig, None))
