"""PRIOR: sentences as soft picks from learned prototypes, which are also generated from the film (Cheng et al., ICCV 2023).

arXiv 2307.12577, read from the released code (QtacierP/PRIOR), which contradicts the paper's abstract in what is masked; its
temperatures, numbers and epochs are the code's. Formulas: docs/methods.md.
"""

from cmcgns.methods.prior.method import METHOD, Settings

__all__ = ["METHOD", "Settings"]
