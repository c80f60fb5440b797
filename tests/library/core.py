"""Python as it is with the core of the package alone: the packages of the extras cannot be found."""

import tomllib

from packaging.requirements import Requirement

from tests.jobs import REPOSITORY

MODULES = {"scikit-learn": "sklearn", "faster-coco-eval": "faster_coco_eval", "faiss-cpu": "faiss"}
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ABSENT = [MODULES.get(name, name) for name in (Requirement(line).name for line in (*EXTRAS["train"], *EXTRAS["cpu"]))]
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder
class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted({*ABSENT} - {"cmcgns"})!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""
"""Lines for the head of a script."""
