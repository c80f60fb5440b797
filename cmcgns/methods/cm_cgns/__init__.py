"""CM-CGNS: cross-modal clustering-guided negative sampling and cross-modal masked image reconstruction (arXiv 2506.11674)."""

from typing import Any

from cmcgns.methods.cm_cgns.settings import Settings

__all__ = ["METHOD", "Settings"]


def __getattr__(name: str) -> Any:
    if name == "METHOD":
        from cmcgns.methods.cm_cgns.method import CmCgns  # lazy: imports torch and transformers

        return CmCgns
    raise AttributeError(name)
