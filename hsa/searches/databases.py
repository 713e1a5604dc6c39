"""The databases that Optuna keeps studies in: the file of an output, or one that several machines share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsa.errors import DestinationError, MachineError, RequestError, shown
from hsa.option_names import option
from hsa.searches.heartbeats import GRACE, INTERVAL

DATABASE = "study.db"

PATIENCE = 10.0
"""Seconds that a run which joins a study waits for the one that is just beginning it."""

ANSWER_SECONDS = 10
"""How long a server may take to answer."""

MOST_RETRIES = 3
"""How often a trial is tried again whose run was lost."""


def open_storage(url: str, *, shared: bool) -> Any:
    """Optuna's storage of a database. RequestError where the URL is none, or its driver is not installed."""
    import optuna
    from sqlalchemy.exc import ArgumentError

    try:
        return _shared_storage(_with_driver(url)) if shared else optuna.storages.RDBStorage(url)
    except (ArgumentError, ValueError) as error:
        raise RequestError(
            f"{option('storage')} must be the URL of a database such as postgresql://user@host/name, got "
            f"{shown(without_password(url))}"
        ) from error
    except RuntimeError as error:  # tables of another version of Optuna
        raise RequestError(f"the storage {without_password(url)} cannot be used: {error}") from error
    except ImportError as error:
        raise RequestError(
            f"{option('storage')} {without_password(url)} needs a driver that is not installed: "
            f"{error.__cause__ or error}; for PostgreSQL pip install psycopg2-binary, for MySQL pip install pymysql"
        ) from error


def _shared_storage(url: str) -> Any:
    """The storage of a database, in which another run may make the tables at the same time: the slower one of them
    fails, and finds them when it tries again."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    end = time.monotonic() + PATIENCE
    while True:
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs={"pool_pre_ping": True, **_timeout(url)},  # servers close connections after a while
                heartbeat_interval=INTERVAL,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MOST_RETRIES),
            )
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            is_made = not isinstance(error, OperationalError) or "already exists" in str(error)
            if not is_made or time.monotonic() > end:
                raise
        time.sleep(0.5)


def _timeout(url: str) -> dict[str, Any]:
    """The arguments of SQLAlchemy that let a server which does not answer be an error after `ANSWER_SECONDS`, unless
    the URL says how long to wait."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    has_it = parsed.get_backend_name() in ("postgresql", "mysql") and "connect_timeout" not in parsed.query
    return {"connect_args": {"connect_timeout": ANSWER_SECONDS}} if has_it else {}


def _with_driver(url: str) -> str:
    """The URL with a driver for PostgreSQL that is installed: which one SQLAlchemy takes depends on its version."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        driver = next((name for name in ("psycopg", "psycopg2") if find_spec(name)), None)
        if driver is not None:
            parsed = parsed.set(drivername=f"postgresql+{driver}")
    return str(parsed.render_as_string(hide_password=False))


def without_password(url: str) -> str:
    """A database URL that may be shown.

    Example:
        >>> without_password("postgresql://me:secret@host/studies")
        'postgresql://me:***@host/studies'
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
        hidden = {name: "..." for name in parsed.query if "pass" in name.lower()}
        return str(parsed.update_query_dict(hidden).render_as_string(hide_password=True))
    except (ArgumentError, ValueError):
        _, at, after = url.rpartition("@")
        return f"...@{after}" if at else url


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Say in one line that a storage cannot be used."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        lines = [line.strip() for line in str(reason or error).splitlines() if line.strip()]
        raise MachineError(
            f"the storage {without_password(url)} cannot be used: {lines[0] if lines else type(error).__name__}"
        ) from error


def sqlite_url(folder: Path) -> str:
    """The URL of the database in a directory, as Optuna takes it, which replaces names in single braces.

    DestinationError where SQLAlchemy could not read it.
    """
    path = os.fspath(folder / DATABASE)
    if "?" in path:
        raise DestinationError(f"output {folder} has a ? in its path, which no database URL can hold; choose another")
    return f"sqlite:///{path.replace('{', '{{').replace('}', '}}')}"
