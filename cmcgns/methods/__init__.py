"""Pretraining methods, one module or package each. Importing this table imports none of them."""

NAMES = (
    "cm-cgns", "infonce", "convirt", "clip", "siglip", "gloria", "mgca", "lovt", "prior", "xdc", "images100m",
)  # fmt: skip
METHODS = {name: f"cmcgns.methods.{name.replace('-', '_')}" for name in NAMES}
"""Modules of the built-in methods, by name."""
