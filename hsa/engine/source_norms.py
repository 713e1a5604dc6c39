"""Sums of squares of the sources' targets, from which distances are computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from hsa.backends.cpu import CpuWorker
from hsa.methods.geometry import Norms
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources


def source_norms(targets: Iterable[Target], sources: Sources) -> Mapping[str, Norms]:
    """The sums of each target, by canonical name; one target is in memory at a time."""
    worker = CpuWorker()
    norms = {}
    roles: tuple[Role, Role] = ("primary", "secondary")
    for target in targets:
        arrays = []
        for role in roles:
            arrays.append(np.empty(target.ref(role).nbytes, np.uint8))
            sources.of(role).read_into(target.ref(role), arrays[-1].data)
        norms[target.projection.name] = worker.norms(target, *arrays)
    return norms
