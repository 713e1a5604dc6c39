"""A one-line error for a library of the extra `eval` that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsa.errors import RequestError


@contextmanager
def needed_for_evaluation(library: str) -> Iterator[None]:
    """Raise RequestError if an import inside the block fails because the library is not installed.

    Example:
        >>> with needed_for_evaluation("soundfile"):
        ...     import soundfile
    """
    try:
        yield
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != library:
            raise
        raise RequestError(
            f"hsa eval needs {library}, which is not installed: pip install 'hsa-merge[eval]'"
        ) from error
    except OSError as error:  # soundfile looks for the C library libsndfile
        raise RequestError(f"hsa eval needs {library}, which cannot be loaded: {error}") from error
