"""Settings of the documentation site: `make docs` builds it into build/docs, and any warning fails."""

from cmcgns import __version__

project = "cmcgns"
author = copyright = "The cmcgns developers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # links to headings, as GitHub makes them
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"cmcgns {version}"
