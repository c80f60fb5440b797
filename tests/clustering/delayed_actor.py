"""Slow clustering actors, in a separate file so that their processes do not import the trainer."""

import random
import time
from typing import Any

from cmcgns.clustering.bank import BankActor


class DelayedActor(BankActor):
    """The last actor delays every pass."""

    longest_s = 3.0

    def call(self, bank: str, method: str, *arguments: Any) -> tuple[bool, Any]:
        if method == "assign" and self.index == self.actors - 1:
            time.sleep(random.uniform(0, self.longest_s))
        return super().call(bank, method, *arguments)


class BrieflyDelayedActor(DelayedActor):
    """The same for a short test; a subclass, because attributes set on the driver do not reach the actors."""

    longest_s = 0.3
