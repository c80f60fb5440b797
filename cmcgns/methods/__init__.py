"""Pretraining methods, one module or package each. Importing this table imports none of them."""

METHODS = {
    name: f"cmcgns.methods.{name.replace('-', '_')}"
    for name in ("cm-cgns", "infonce", "convirt", "clip", "siglip", "gloria", "xdc", "images100m")
}
"""Modules of the built-in methods, by name."""
