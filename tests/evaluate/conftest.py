"""One Ray connection for all evaluations: tasks find processes that have torch and transformers, whose import takes 5 s."""

from collections.abc import Iterator

import pytest

from tests.ray_head import RayHead, connected


@pytest.fixture(scope="package")
def local_ray(ray_head: RayHead) -> Iterator[None]:
    """This process is a driver of ``ray_head`` until the tests of this folder end."""
    with connected(ray_head):
        yield
