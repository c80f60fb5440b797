"""Compile DeepSpeed's communication op once, before any training run: `python -m cmcgns.train.build_ops`."""

import torch

from cmcgns.train.engine import import_deepspeed


def main() -> None:
    """Compile with g++ and ninja into the folder where every run looks for it."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
