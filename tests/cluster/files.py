"""The cluster files as their readers hold them, and what pyproject.toml says of versions."""

import tomllib
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.jobs import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
RAY_UP = ("gpu", "gcp", "on_prem")
"""Files for ``ray up``."""
CONTAINERS = ("gpu", "gcp")
"""Those that run Ray in a container."""
KUBERAY = ("raycluster", "rayjob")


def load(name: str) -> dict[str, Any]:
    """``cluster/NAME.yaml`` as it is read."""
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def requirement(package: str) -> SpecifierSet:
    """The versions of a package that pyproject.toml takes."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return next(r.specifier for r in map(Requirement, project["dependencies"]) if r.name == package)


def ray_of_image(image: str) -> str:
    """The Ray version that an image's tag names, as rayproject/ray:2.60.0-py311 and cmcgns:ray2.60.0 do."""
    tag = image.rpartition(":")[2]
    return tag.removeprefix("ray").partition("-")[0]
