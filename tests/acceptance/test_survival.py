"""Killed workers, killed drivers, other numbers of workers, Ctrl-C; the tests lie beside the modules."""

from tests.train.test_survival import *  # noqa: F403
