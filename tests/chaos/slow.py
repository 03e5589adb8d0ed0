"""ALFWorld that answers a step after a while, as an environment at the other end of a network does."""

from __future__ import annotations

import os
import time

from env_servers.alfworld.environment import AlfWorld
from env_servers.environment import Observation

STEP_VARIABLE = "SLOW_STEP_S"


class SlowAlfWorld(AlfWorld):
    """Waits `$SLOW_STEP_S` seconds before each step."""

    blocking = True

    def step(self, action: str) -> Observation:
        time.sleep(float(os.environ[STEP_VARIABLE]))
        return super().step(action)
