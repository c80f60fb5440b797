"""LoVT: patches and sentences pick what they read in the other modality (Mueller et al., ECCV 2022, arXiv 2112.02889).

Read from the released code (philip-mueller/lovt); how the paper writes the weights of the losses is recalled. Formulas:
docs/methods.md.
"""

from cmcgns.methods.lovt.method import METHOD, Settings

__all__ = ["METHOD", "Settings"]
