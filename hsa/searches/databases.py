"""The databases in which Optuna stores studies: the file of an output, or one that several machines share."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa.errors import DestinationError, MachineError, RequestError, shown
from hsa.option_names import option
from hsa.searches.heartbeats import GRACE, INTERVAL

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

DATABASE = "study.db"

PATIENCE = 10.0
"""Seconds that a run waits when it joins a study that another run is just creating."""

ANSWER_SECONDS = 10
"""Seconds that a server may take to answer."""

MOST_RETRIES = 3
"""Maximum retries of a trial whose run was lost."""

_FOR_MYSQL = {"pymysql": "pymysql", "mysqldb": "MySQLdb"}
DRIVERS = {
    "postgresql": {"psycopg": "psycopg", "psycopg2": "psycopg2"},
    "mysql": _FOR_MYSQL,
    "mariadb": _FOR_MYSQL,
}
"""SQLAlchemy's driver names, by the kind of database, with the modules that they need. The first installed one is used.
All accept the argument connect_timeout."""

ESCAPES = "write @ : / ? # and % of a password as %40 %3A %2F %3F %23 and %25"

_PLAIN = re.compile(r"[\w./ -]*")
"""A host, a database or a path that can be trusted. No character in it makes the end of a password unclear."""

_SCHEME = re.compile(r"[a-zA-Z][\w+]*://")
_SECRET_NAME = re.compile("pass|pwd|secret|token", re.IGNORECASE)
"""URL arguments after the ? whose values are passwords."""


def open_storage(url: str, *, shared: bool) -> Any:
    """Open Optuna's storage of a database. RequestError if the URL is invalid, or its driver is not installed."""
    import optuna
    from sqlalchemy.exc import ArgumentError

    try:
        return _shared_storage(_with_driver(url)) if shared else optuna.storages.RDBStorage(url)
    except (ArgumentError, ValueError):
        raise RequestError(
            f"{option('storage')} must be the URL of a database such as postgresql://user@host/name, got "
            f"{shown(without_password(url))}; {ESCAPES}"
        ) from None  # the cause may show a part of the password
    except RuntimeError as error:  # tables of another version of Optuna
        raise RequestError(f"the storage {without_password(url)} cannot be used: {error}") from error
    except ImportError as error:
        raise RequestError(
            f"{option('storage')} {without_password(url)} needs a driver that is not installed: "
            f"{error.__cause__ or error}; for PostgreSQL pip install psycopg2-binary, for MySQL pip install pymysql, "
            f"and name no other driver in the URL"
        ) from error


def _shared_storage(url: str) -> Any:
    """Open the storage of a shared database. If another run creates the tables at the same time, the slower run fails
    and finds them when it tries again."""
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
    """The arguments of SQLAlchemy that turn a missing answer into an error after `ANSWER_SECONDS`, unless the URL sets
    a timeout."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    knows_it = parsed.get_driver_name() in DRIVERS.get(parsed.get_backend_name(), ())
    if not knows_it or "connect_timeout" in parsed.query:
        return {}
    return {"connect_args": {"connect_timeout": ANSWER_SECONDS}}


def _with_driver(url: str) -> str:
    """Add an installed driver to a URL that names none, because SQLAlchemy's default depends on its version.
    RequestError if an @ of the password was taken for its end."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    if "@" in (parsed.host or ""):
        raise RequestError(f"{option('storage')} {without_password(url)} has an @ in the name of its host; {ESCAPES}")
    installed = (name for name, module in DRIVERS.get(parsed.drivername, {}).items() if find_spec(module))
    driver = next(installed, None)
    if driver is not None:
        parsed = parsed.set(drivername=f"{parsed.drivername}+{driver}")
    return str(parsed.render_as_string(hide_password=False))


def without_password(url: str) -> str:
    """A database URL that may be shown: without its password and its query. If the password cannot be identified for
    certain, only the kind of database is shown.

    Example:
        >>> without_password("postgresql://me:secret@host/studies?sslmode=require")
        'postgresql://me:***@host/studies?...'
        >>> without_password("postgresql://me:sec@ret@host/studies")
        'postgresql://...'
    """
    parsed = _unambiguous(url)
    if parsed is not None:
        text = str(parsed.set(query={}).render_as_string(hide_password=True))
        return f"{text}?..." if parsed.query else text
    if _PLAIN.fullmatch(url):
        return url
    scheme = _SCHEME.match(url)
    return f"{scheme[0]}..." if scheme else "..."


def _unambiguous(url: str) -> URL | None:
    """The parts of a URL; None if it cannot be parsed, or if a part of a password may have been taken for another
    part."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    rest = url.partition("://")[2]
    if parsed.get_backend_name() == "sqlite" and rest.startswith("/"):
        return parsed  # the path of a file
    host, database = (parsed.host or "").replace(":", ""), parsed.database or ""  # IPv6 has colons
    is_plain = _PLAIN.fullmatch(host) and _PLAIN.fullmatch(database)
    return parsed if is_plain and rest.count("@") == (parsed.username is not None) else None


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Report an unusable storage in one line. The driver's message is left out if it may contain a part of the
    password."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        problem = f"the storage {without_password(url)} cannot be used"
        if not _may_be_shown(str(reason or error), url):
            name = type(reason or error).__name__
            raise MachineError(f"{problem}: {name}, whose text may show a part of the password; {ESCAPES}") from None
        lines = [line.strip() for line in str(reason or error).splitlines() if line.strip()]
        raise MachineError(f"{problem}: {lines[0] if lines else type(error).__name__}") from error


def _may_be_shown(text: str, url: str) -> bool:
    """Whether a driver's message may be shown. It must not contain a secret that the shown URL does not contain too,
    for example because it equals the user's name."""
    parsed = _unambiguous(url)
    if parsed is None:
        return False
    values = [value for name, found in parsed.normalized_query.items() if _SECRET_NAME.search(name) for value in found]
    secrets = [str(secret) for secret in (parsed.password, *values) if secret]
    known = without_password(url)
    return not any(secret in text and secret not in known for secret in secrets)


def sqlite_url(folder: Path) -> str:
    """The URL of the database in a directory. It is escaped for Optuna, which replaces names in single braces.

    DestinationError if SQLAlchemy could not read it.
    """
    path = os.fspath(folder / DATABASE)
    if "?" in path:
        raise DestinationError(f"output {folder} has a ? in its path, which no database URL can hold; choose another")
    return f"sqlite:///{path.replace('{', '{{').replace('}', '}}')}"
