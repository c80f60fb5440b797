"""The message of an error that Ray has wrapped."""

import pytest

from cmcgns.errors import UserError, cause
from cmcgns.storage.errors import MissingFileError


def test_our_own_error_gives_its_first_line() -> None:
    assert cause(MissingFileError("x does not exist\nand a hint")) == "x does not exist"
    assert cause(RuntimeError("first\nlast")) == "last"


@pytest.mark.ray
def test_an_error_of_a_data_task_keeps_its_message(local_ray: None) -> None:
    import ray.data

    def fail(rows: dict[str, object]) -> dict[str, object]:
        raise UserError("s3://x: the bucket does not exist")
        yield rows

    with pytest.raises(UserError) as raised:
        ray.data.range(1).map_batches(fail).take()
    assert cause(raised.value) == "s3://x: the bucket does not exist"
