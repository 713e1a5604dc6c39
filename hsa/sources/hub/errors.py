"""Turn the errors of huggingface_hub into one line that says what to do, without a token or a signed address."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from hsa.errors import HsaError, MachineError, SourceError, shown
from hsa.option_names import option
from hsa.sources.hub.range_requests import invalid_url_error, network_error
from hsa.sources.hub.repository import HubId
from hsa.sources.roles import Role
from hsa.system.descriptors import reason

CACHE_FULL = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
"""Errors that the disk under the cache may report."""

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Raised by huggingface_hub and the HTTP library below it for an answer of an unexpected form."""


@contextmanager
def map_hub_errors(role: Role, hub_id: HubId) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line that says what to do."""
    try:
        yield
    except HsaError:
        raise
    except Exception as error:
        mapped = _explain(error, role, hub_id)
        if mapped is None:
            raise
        raise mapped from None  # the library's own text may contain a server's output and signed links


def _explain(error: Exception, role: Role, hub_id: HubId) -> HsaError | None:
    from huggingface_hub import constants, errors

    name = f"{role}: {hub_id.repo}"
    where = f"{constants.ENDPOINT}/{hub_id.repo}"
    local = f"a local directory of that name would be ./{hub_id.repo}"
    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if isinstance(error, errors.GatedRepoError):
        return SourceError(f"{name} is gated: accept its terms at {where} and log in (hf auth login), or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{name} has no revision {shown(hub_id.revision or 'main')}; see {where}/commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{name} is no local directory, and {constants.ENDPOINT} shows no such model; check the name, or, where it "
            f"is private, log in with an account that may read it (hf auth login), or set HF_TOKEN"
        )
    if isinstance(error, errors.DisabledRepoError):
        return SourceError(f"{name} was disabled on the Hub; take another model")
    if status in (401, 403):
        return SourceError(
            f"{name}: the Hub refuses access ({status}); log in anew (hf auth login), or set HF_TOKEN to another token"
        )
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        cause = error.__cause__
        cause_name = f" ({type(cause).__name__})" if cause is not None else ""
        return MachineError(
            f"{name}: a file is not in the cache and {constants.ENDPOINT} cannot be asked{cause_name}; check the "
            f"network and HF_HUB_OFFLINE; {local}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"{name}: a file that the repository lists is missing on the Hub; see {where}/tree/main")
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{name} is no local directory and no name that the Hub knows; check it")
    if status is not None:
        return MachineError(f"{name}: {constants.ENDPOINT} answered {status}; try again later")
    if isinstance(error, network_error()):
        return MachineError(
            f"{name} is taken for a model on the Hub, and {constants.ENDPOINT} cannot be reached "
            f"({type(error).__name__}); check the network and try again; {local}"
        )
    if isinstance(error, (*MALFORMED, invalid_url_error())):
        return MachineError(
            f"{name}: {constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}); check HF_ENDPOINT "
            f"and the network"
        )
    if isinstance(error, OSError) and error.errno in CACHE_FULL:
        return MachineError(
            f"{name}: the cache {constants.HF_HUB_CACHE} cannot be written: {reason(error)}; free some space there, "
            f"or set HF_HOME to a directory that can be written"
        )
    if isinstance(error, OSError):
        problem = reason(error) if error.strerror else type(error).__name__
        return MachineError(f"{name} could not be fetched: {problem}; see {option('debug')}")
    return None
