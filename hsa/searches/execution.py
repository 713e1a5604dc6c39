"""How a search is executed: in one process, in several, or on a Ray cluster; and where it stores its trials."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from hsa.errors import RequestError, shown
from hsa.option_names import option
from hsa.searches.pools import Pool, ThisProcess
from hsa.searches.setups import Setup
from hsa.searches.store import SEARCH
from hsa.system.ray_cluster import check_address, connected

MOST_WORKERS = 1024


@dataclass(frozen=True)
class Execution:
    """How a search is executed; see `hsa.search` for each field. Raises RequestError for an invalid value.

    Example:
        >>> Execution(workers=2).ray
        False
    """

    workers: int | None = None
    ray: bool | str = False
    storage: str | None = None
    study: str = SEARCH

    def __post_init__(self) -> None:
        workers = self.workers
        is_number = isinstance(workers, int) and not isinstance(workers, bool) and 1 <= workers <= MOST_WORKERS
        if workers is not None and not is_number:
            raise RequestError(
                f"{option('workers')} must be a whole number from 1 to {MOST_WORKERS}, got {shown(workers)}"
            )
        if not isinstance(self.ray, bool):
            check_address(self.ray)
        if self.storage is not None and (not isinstance(self.storage, str) or "://" not in self.storage):
            raise RequestError(f"{option('storage')} must be the URL of a database such as postgresql://user@host/name")
        if not isinstance(self.study, str) or not self.study.strip() or len(self.study) > 200:
            raise RequestError(f"{option('study')} must be a name, got {shown(self.study)}")
        if self.storage is None and self.study != SEARCH:
            raise RequestError(f"{option('study')} names a search in a shared database; give {option('storage')} too")


def open_pool(setup: Setup, execution: Execution, stack: ExitStack) -> Pool:
    """Open the pool that runs the tasks of a search; `stack` leaves the cluster. Raises the errors of opening the
    setup."""
    if execution.ray:
        from hsa.searches.ray_actors import RayPool

        ray = stack.enter_context(connected(None if execution.ray is True else execution.ray))
        return RayPool(ray, setup, execution.workers)
    if execution.workers is not None and execution.workers > 1:
        from hsa.searches.processes import ProcessPool

        return ProcessPool(setup, execution.workers)
    return ThisProcess(setup)
