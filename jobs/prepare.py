"""Convert a raw corpus to shards: `python jobs/prepare.py --data.uri=RAW --prepare.out=URI ...`; see --help."""

import sys

from cmcgns.cli import run_job
from cmcgns.data.prepare.config import PrepareJobConfig


def main(config: PrepareJobConfig) -> int:
    """Exit status of a prepare, or of the check of a prepared set or an export."""
    if config.prepare.check:
        from cmcgns.data.prepare.check import check_set
        from cmcgns.data.prepare.check_export import check_export, export_folder

        export = export_folder(config.prepare.out)
        return check_export(export) if export else check_set(config.prepare.out)
    from cmcgns.data.prepare.run import prepare

    return prepare(config)


if __name__ == "__main__":
    arguments = ["--prepare.check=true" if word == "--check" else word for word in sys.argv[1:]]
    sys.exit(run_job(main, PrepareJobConfig, None, arguments))
