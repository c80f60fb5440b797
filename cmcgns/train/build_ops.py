"""Builds DeepSpeed's communication op once, so that no training run has to: `python -m cmcgns.train.build_ops`."""

import torch

from cmcgns.train.engine import import_deepspeed


def main() -> None:
    """Compile with g++ and ninja into the folder that every run looks in."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
