"""A plugin file with a method that waits in tasks of Ray: `maximum`, which says where it runs and goes on when it may.

Its folder is named in HSA_WAITING. There it writes `on-<node>` when it begins, and waits until `go` exists.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from maximum_method import Maximum, MaximumSettings

from hsa.methods import Block

__all__ = ["Waiting", "WaitingSettings"]

PATIENCE = 120.0


@dataclass(frozen=True)
class WaitingSettings(MaximumSettings):
    method = "waiting"


class Waiting(Maximum):
    name, title = "waiting", "Maximum that waits"
    Settings = WaitingSettings

    def apply(self, block: Block, decision: float, out: np.ndarray) -> None:
        if ray.is_initialized():
            self._wait()
        super().apply(block, decision, out)

    def _wait(self) -> None:
        folder = Path(os.environ["HSA_WAITING"])
        (folder / f"on-{ray.get_runtime_context().get_node_id()}").touch()
        end = time.monotonic() + PATIENCE
        while not (folder / "go").exists() and time.monotonic() < end:
            time.sleep(0.02)
