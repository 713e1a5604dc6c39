"""Sums over the sources' targets, from which distances are computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hsa.backends.cpu import CpuWorker
from hsa.methods.base import BASE
from hsa.methods.tensors import TensorTask
from hsa.planning.tasks import Targets
from hsa.sources.source_set import Sources


def source_norms(targets: Targets, tasks: Iterable[TensorTask], sources: Sources) -> Mapping[str, Any]:
    """The method's distance sums for some of its targets, by canonical name; one target is in memory at a time."""
    worker, method = CpuWorker(targets.method, targets.settings), targets.method
    norms = {}
    for task in tasks:
        data = {}
        for role, ref in task.sources.items():
            if role == BASE:
                continue
            data[role] = np.empty(ref.nbytes, np.uint8)
            sources.of(role).read_into(ref, data[role].data)
        norms[task.name] = method.distance_sums(task, worker.each_block(task, data, method.measure_distances))
    return norms
