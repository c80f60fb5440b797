"""The objective on 1, 2 and 3 ranks, and ZeRO 0-3 beside the plain engine; the tests lie beside the modules."""

from tests.methods.test_ranks import *  # noqa: F403
from tests.train.test_engine import *  # noqa: F403
