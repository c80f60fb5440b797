"""Container images in the cluster files: each by digest, or with a place for one that a runtime refuses until it is filled."""

import re
from pathlib import Path

import pytest

from tests.cluster.dockerfile import arguments, instructions
from tests.cluster.files import CLUSTER

FILES = sorted(CLUSTER.rglob("*.yaml"))
IMAGE = re.compile(r"^[^#\n]*\bimage:\s*(?:&\w+\s+)?([^\s#*]+)", re.MULTILINE)
BY_DIGEST = re.compile(r"[\w./-]+:[\w.-]+@sha256:(CHANGE|[0-9a-f]{64})")


def images(text: str) -> list[str]:
    """Container images that a cluster file names; a machine image (ami-...) is not one."""
    return [image for image in IMAGE.findall(text) if not image.startswith("ami-")]


def test_the_cluster_files_name_images() -> None:
    assert sum(len(images(file.read_text())) for file in FILES) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_tag_that_was_moved_cannot_bring_another_image(file: Path) -> None:
    assert [image for image in images(file.read_text()) if not BY_DIGEST.fullmatch(image)] == []


def test_a_base_image_that_was_moved_cannot_be_built_on() -> None:
    """`FROM name:tag@` is no reference: docker refuses it."""
    file = CLUSTER / "Dockerfile"
    (base,) = arguments(file, "FROM")
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@\$\{BASE_DIGEST\}", base)
    assert instructions(file)[0] == ("ARG", "BASE_DIGEST")  # without a default


@pytest.mark.parametrize("image", ["a/b:latest", "a/b", "a/b:1.0", "a/b:1.0@sha256:", "a/b:1.0@sha256:abc"])
def test_a_mutable_image_is_found(image: str) -> None:
    (found,) = images(f"  image: &image {image}  # ours\n")
    assert not BY_DIGEST.fullmatch(found)
