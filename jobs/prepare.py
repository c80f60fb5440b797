"""Make shards of a raw corpus: `python jobs/prepare.py --data.uri=RAW --prepare.out=URI ...`; see --help."""

import sys

from cmcgns.command_line import run_job
from cmcgns.prepare.job_config import PrepareJobConfig


def main(config: PrepareJobConfig) -> int:
    """Exit status of a preparation, or of the check of a prepared set."""
    if config.prepare.check:
        from cmcgns.prepare.check import check_set

        return check_set(config.prepare.out)
    from cmcgns.prepare.run import prepare  # heavy: --help and --print-config need none of it

    return prepare(config)


if __name__ == "__main__":
    arguments = ["--prepare.check=true" if word == "--check" else word for word in sys.argv[1:]]
    sys.exit(run_job(main, PrepareJobConfig, None, arguments))
