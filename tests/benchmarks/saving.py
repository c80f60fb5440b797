"""What a checkpoint costs the loop: rounds of 50 steps with one, written beside the loop or waited for, and without, in turn."""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from cmcgns.cli import load_config
from cmcgns.config import Config
from cmcgns.data.batch import Batcher
from cmcgns.methods.base import load_method
from cmcgns.models.dual_encoder import DualEncoder
from cmcgns.train.schedule import Schedule
from cmcgns.train.trainer import Parts, Trainer
from tests.benchmarks.measure import Line, interleaved, ratio_of_medians, where
from tests.benchmarks.trainer import VOCABULARY, CachedBlocks
from tests.small import banks_of
from tests.train.memory import Quiet

STEPS, ROUNDS, WANTED = 50, 5, 1.03
DEFAULT = Path(__file__).parents[2] / "jobs" / "configs" / "phantom.yaml"


def build_trainer(folder: Path) -> Trainer:
    """The model and batches of the default run, with InfoNCE and plain torch, which saves what ZeRO 0 to 2 save."""
    overrides = (
        "--method.name=infonce", "--train.engine=torch", "--train.zero_stage=0", "--train.stage2_steps=0",
        "--train.microbatch_size=16", "--train.checkpoint_every=1000000", "--train.validate_every=1000000",
    )  # fmt: skip
    config = load_config([*overrides, f"--config={DEFAULT}"], Config, None)
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
        blocks=CachedBlocks(config),
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


def lines(rounds: int = ROUNDS) -> list[Line]:
    """The cost of a checkpoint every 50 steps."""
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
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(where(), *lines(parser.parse_args().rounds), sep="\n")
