"""The cluster files, and the versions in pyproject.toml."""

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
"""Files that run Ray in a container."""
KUBERAY = ("raycluster", "rayjob")


def load(name: str) -> dict[str, Any]:
    """Content of ``cluster/NAME.yaml``."""
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def requirement(package: str) -> SpecifierSet:
    """Versions of a package that pyproject.toml allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    return next(r.specifier for r in map(Requirement, listed) if r.name == package)


def ray_of_image(image: str) -> str:
    """Ray version in an image's tag, such as rayproject/ray:2.60.0-py311@sha256:... or cmcgns:ray2.60.0."""
    tag = image.partition("@")[0].rpartition(":")[2]
    return tag.removeprefix("ray").partition("-")[0]
