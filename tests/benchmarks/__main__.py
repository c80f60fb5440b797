"""All benchmarks of this machine in one table; ends with status 1 where one misses what was wanted."""

import sys

from tests.benchmarks import (
    clustering,
    decoding,
    deterministic,
    evaluating,
    heads,
    method_heads,
    preparing,
    saving,
    streaming,
    trainer,
)
from tests.benchmarks.measure import where

if __name__ == "__main__":
    print(where())
    table = [*heads.lines(), *method_heads.lines(), *trainer.lines(), *saving.lines(), *deterministic.lines()]
    table += [*clustering.lines(), *decoding.lines(), *preparing.lines(), *streaming.lines(), *evaluating.lines()]
    print(*table, sep="\n")
    sys.exit(any(line.good is False for line in table))
