"""The numbers of the published pieces, to 1e-9 in float64; the tests themselves lie beside the modules."""

from tests.methods.test_golden import *  # noqa: F403
from tests.models.test_golden import *  # noqa: F403
