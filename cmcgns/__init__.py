"""CM-CGNS pretraining of chest X-ray and report encoders on Ray and DeepSpeed, and the trained models in use.

``load`` opens a trained model (docs/library.md), ``load_index`` an index for search (docs/searching.md). Importing this package
is fast: torch is imported when a model is loaded.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmcgns.errors import UserError
    from cmcgns.library.model import Heatmap, Model, load
    from cmcgns.search.index import Index, load_index

__version__ = "0.1.0"
__all__ = ["Heatmap", "Index", "Model", "UserError", "__version__", "load", "load_index"]
_HOMES = {
    "Heatmap": "library.model", "Model": "library.model", "load": "library.model", "Index": "search.index",
    "load_index": "search.index", "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cmcgns' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cmcgns.{_HOMES[name]}"), name)
