"""matplotlib, for pictures in files."""

import os

# a notebook's backend, which may not be installed here, would fail at import; afterwards it is the notebook's again
_backend = os.environ.pop("MPLBACKEND", None)

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
matplotlib.rcParams["text.parse_math"] = False  # names of classes and settings may hold dollars
colormaps = matplotlib.colormaps

__all__ = ["Axes", "Figure", "FormatStrFormatter", "LogLocator", "NullFormatter", "Rectangle", "colormaps"]
