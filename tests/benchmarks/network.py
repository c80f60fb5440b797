"""Step time and bytes of a step over one, two and three pretend machines whose cables let 1 or 10 Gbit/s through, with
gradients reduced while the backward pass runs and after it: `python -m tests.benchmarks.network` (root, namespaces).

All machines share the cores of this one: times compare within one number of hosts, bytes compare anywhere. Every run of a number
of hosts sees the same studies and has to give the same losses.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import where
from tests.jobs import TINY, rows
from tests.rehearsal.cluster import Cluster, running_cluster
from tests.rehearsal.hosts import skip_unless_possible

RATES = ("1gbit", "10gbit")
MICROBATCH, WARM_UP, STEPS = 8, 3, 13
"""Studies of one host; the first steps, which are not counted; all steps."""
SETTINGS = (
    "--model.image_encoder=vit-small", "--model.text_encoder=bert-mini", "--model.embed_dim=128", "--train.zero_stage=2",
    "--train.placement=spread", f"--train.microbatch_size={MICROBATCH}", "--train.log_every=1", "--clustering.actors=1",
    f"--train.stage1_steps={STEPS}", "--train.stage2_steps=0", "--train.warmup_steps=0", "--train.checkpoint_every=1000",
)  # fmt: skip
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """What a run over ``hosts`` took."""

    hosts: int
    rate: str
    overlap: bool
    step_s: float
    """Median over the steps; ranks wait for one another in each."""
    mib: float
    """Sent through all cables together in a step: gradients, features, films, Ray's own."""
    losses: list[float]

    def __str__(self) -> str:
        return (
            f"| {self.hosts} | {self.rate} | {'yes' if self.overlap else 'no'} | {self.step_s:.2f} | {self.mib:.0f} |"
        )


def measure(cluster: Cluster, storage: Path, hosts: int, rate: str, overlap: bool) -> Measured:
    """One run, by `ray job submit`."""
    name = f"{hosts}-{rate}-{'overlap' if overlap else 'after'}"
    job = cluster.start_job(
        "python", "jobs/pretrain.py", f"--config={TINY}", f"--run.storage={storage}", f"--run.name={name}", *SETTINGS,
        f"--train.num_workers={hosts}", f"--train.global_batch_size={MICROBATCH * hosts}",
        f"--train.overlap_comm={str(overlap).lower()}",
    )  # fmt: skip
    folder = storage / name
    job.wait_for(lambda: len(rows(folder)) >= WARM_UP)
    first, before = len(rows(folder)), sent(cluster)
    job.wait_for(lambda: len(rows(folder)) >= STEPS - 1)
    last, after = len(rows(folder)), sent(cluster)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    done = rows(folder)
    step_s = median(row["step_s"] for row in done[WARM_UP:])
    return Measured(hosts, rate, overlap, step_s, (after - before) / (last - first) / MIB, [r["loss"] for r in done])


def sent(cluster: Cluster) -> int:
    """Bytes that have left the cluster's machines."""
    return sum(host.bytes_sent() for host in cluster.hosts.values() if host is not cluster.operator)


def table(folder: Path) -> Iterator[Measured]:
    """Every run, one after another on one cluster."""
    with running_cluster(folder) as cluster:
        for rate in RATES:
            for host in cluster.hosts.values():
                host.narrow(rate)
            for hosts in (1, 2, 3):
                if hosts == 1 and rate != RATES[0]:
                    continue  # nothing of a step's goes through its cable
                for overlap in (False, True):
                    yield measure(cluster, folder / "runs", hosts, rate, overlap)


def main() -> None:
    """Print the table as it is measured."""
    skip_unless_possible(install=True)
    print(
        where(), "| hosts | cables | overlap | s a step | MiB a step |", "|---|---|---|---|---|", sep="\n", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        first: dict[int, list[float]] = {}
        for line in table(Path(folder)):
            print(line, flush=True)
            expected = first.setdefault(line.hosts, line.losses)
            assert all(abs(a / b - 1) < 1e-4 for a, b in zip(line.losses, expected, strict=True)), line.losses


if __name__ == "__main__":
    main()
