"""What a checkpoint costs: time of the loop (rounds of 50 steps with one, written beside the loop or waited for, and without, in
turn), and memory of the host with ZeRO-3 (300 million parameters on two ranks)."""

import argparse
import gc
import shutil
import tempfile
from pathlib import Path

import torch

from cmcgns import distributed
from cmcgns.cli import load_config
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.methods.base import load_method
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.models.presets import TEXT_PRESETS
from cmcgns.train.schedule import Schedule
from cmcgns.train.trainer import Parts, Trainer
from tests.benchmarks.measure import Line, highest_mib, interleaved, ratio_of_medians, where
from tests.benchmarks.trainer import VOCABULARY, CachedBlocks
from tests.ranks import run_on_ranks
from tests.small import banks_of
from tests.train.memory import MemoryBlocks, Quiet

STEPS, ROUNDS, WANTED = 50, 5, 1.03
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
"""BERT-large: 302 million parameters without its vocabulary."""
RANKS, BYTES, WANTED_MEMORY = 2, 12, 0.6
"""Bytes of state per parameter: weight and two averages in fp32."""
DEFAULT = Path(__file__).parents[2] / "jobs" / "configs" / "phantom.yaml"


def build_trainer(folder: Path, *more: str) -> Trainer:
    """The model and batches of the default run, with InfoNCE and plain torch, which saves what ZeRO 0 to 2 save."""
    overrides = (
        "--method.name=infonce", "--train.engine=torch", "--train.zero_stage=0", "--train.stage2_steps=0",
        "--train.microbatch_size=16", "--train.checkpoint_every=1000000", "--train.validate_every=1000000",
    )  # fmt: skip
    config = load_config([*overrides, *more, f"--config={DEFAULT}"], Config, None)
    method = load_method(config)

    def model() -> DualEncoder:
        torch.manual_seed(0)
        return method.build_model(VOCABULARY)

    def keep(filled: Path, step: int) -> None:
        shutil.copytree(filled, folder / f"checkpoint_{step}")
        shutil.rmtree(folder / f"checkpoint_{step}")

    parts = Parts(
        method=method,
        build_model=model,
        blocks=CachedBlocks(config) if distributed.world_size() == 1 else MemoryBlocks(config, 64),
        batcher=Batcher(config, 0, torch.device("cpu")),
        banks=banks_of(config),
        schedule=Schedule(1_000_000, 0, 0),
        device=torch.device("cpu"),
        log=None,
        display=Quiet(),
        keep=keep,
        stop_requested=lambda: False,
    )
    return Trainer(config, parts)


def saved_on_a_rank(folder: str) -> tuple[float, float]:
    """MiB of the whole state of a large model, and by how much a step beside which a checkpoint is written takes more memory of
    this rank than a step without."""
    TEXT_PRESETS["bert-large"] = LARGE
    trainer = build_trainer(
        Path(folder) / f"rank{distributed.rank()}", "--model.text_encoder=bert-large", "--train.engine=deepspeed",
        "--train.zero_stage=3", f"--train.num_workers={RANKS}", "--train.microbatch_size=2",
        f"--train.global_batch_size={2 * RANKS}",
    )  # fmt: skip
    for _ in range(2):  # gradients and averages have their memory
        trainer.next_step()
    gc.collect()

    def save() -> None:
        trainer.save()
        trainer.next_step()
        trainer.writer.wait()

    alone = highest_mib(trainer.next_step)
    return sum(trainer.sizes.values()) * BYTES / 2**20, highest_mib(save) - alone


def memory_line() -> Line:
    """How far a checkpoint with ZeRO-3 raises the memory of a host that has all ranks, of the whole state."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_on_ranks(RANKS, saved_on_a_rank, folder)
    whole, peaks = ranks[0][0], [peak for _, peak in ranks]
    share = sum(peaks) / whole
    return Line(
        f"a checkpoint, ZeRO-3, {RANKS} ranks of a host, {whole * 2**20 / BYTES / 1e6:.0f} M parameters",
        f"{share:.2f} of the whole state ({sum(peaks):.0f} of {whole:.0f} MiB; worst rank {max(peaks):.0f})",
        f"{WANTED_MEMORY}",
        share < WANTED_MEMORY,
    )


def lines(rounds: int = ROUNDS) -> list[Line]:
    """The cost of a checkpoint every 50 steps, and its memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(Path(folder))

        def steps(save: bool, wait: bool) -> None:
            if save:
                trainer.save()
            if wait:
                trainer.writer.wait()
            for _ in range(STEPS):
                trainer.next_step()
            trainer.writer.wait()

        runs = {
            "without": lambda: steps(save=False, wait=False),
            "beside": lambda: steps(save=True, wait=False),
            "waited for": lambda: steps(save=True, wait=True),
        }
        seconds = interleaved(runs, rounds, warm_up=1)
    beside, waited = (ratio_of_medians(seconds, name, "without") for name in ("beside", "waited for"))
    size = sum(parameter.numel() for parameter in trainer.engine.module.parameters()) / 1e6
    what = f"{STEPS} steps with a checkpoint ({size:.1f} M parameters), beside the loop"
    return [
        Line(what, f"{beside:.3f} of the time without", f"{WANTED:.2f}", beside <= WANTED),
        Line("the same, waited for", f"{waited:.3f} of the time without"),
        memory_line(),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", action="store_true", help="memory only")
    arguments = parser.parse_args()
    print(where(), *([memory_line()] if arguments.memory else lines(arguments.rounds)), sep="\n")
