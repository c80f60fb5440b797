"""What `train.deterministic` costs: steps of the default run's first stage with and without it, in turn."""

import tempfile
from pathlib import Path

import torch

from cmcgns.train.speed import set_up_torch
from tests.benchmarks.measure import Line, interleaved, ratio_of_medians, where
from tests.benchmarks.saving import build_trainer

STEPS, ROUNDS = 5, 9


def lines() -> list[Line]:
    """Time of ``STEPS`` steps with the setting, beside the time without."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(Path(folder), "--method.name=cm-cgns")

        def steps(deterministic: bool) -> None:
            torch.use_deterministic_algorithms(False)
            set_up_torch(trainer.config.train.model_copy(update={"deterministic": deterministic}), torch.device("cpu"))
            for _ in range(STEPS):
                trainer.next_step()

        try:
            seconds = interleaved({"without": lambda: steps(False), "with": lambda: steps(True)}, ROUNDS, warm_up=1)
        finally:
            torch.use_deterministic_algorithms(False)
    ratio = ratio_of_medians(seconds, "with", "without")
    return [Line("steps with train.deterministic, on a CPU", f"{ratio:.3f} of the time without")]


if __name__ == "__main__":
    print(where(), *lines(), sep="\n")
