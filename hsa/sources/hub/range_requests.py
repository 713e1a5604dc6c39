"""Fetch byte ranges of one file on the Hub by HTTP: redirects, retries, and servers without range support.

Source: RFC 9110 section 14 on range requests; the Hub's URL scheme as huggingface_hub uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import urljoin, urlsplit

from hsa.errors import MachineError, SourceChanged
from hsa.sources.hub.partial_file import PartialFile
from hsa.system.ranges import Range, coalesce

HEADER_GUESS = 256 << 10
"""Bytes of the first request to a file; the header of large-v3 has 150 kB."""

GAP = 1 << 20
"""The largest gap between two ranges, in bytes, that is fetched to save a request: about one round trip's worth."""

WASTE = 100
"""At most one in so many bytes of a file is fetched only because it lies between two ranges."""

COMMIT = 16 << 20
"""Bytes after which fetched data is committed, so that a killed run resumes there."""

ATTEMPTS = 5
"""Attempts without a single byte of progress before a fetch gives up."""

PAUSE = 0.25
"""Seconds before the second attempt, doubled for each later one."""

MAX_DIGITS = 20
"""The most digits of a byte offset in a Content-Range."""

REDIRECTS = 10
_MOVED = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_EXPIRED = {401, 403, 404, 410}


class RangesUnsupported(Exception):
    """The server answers a range request with the whole file."""


class TransientError(Exception):
    """A failure that may not recur on a retry; the text describes it. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help: a network failure, or a server that is temporarily busy or broken."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _TRANSIENT
    return isinstance(error, (TransientError, network_error()))


def network_error() -> type[Exception]:
    """The HTTP library's base class for failed requests. The version of huggingface_hub decides which library it is."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return http_error


def invalid_url_error() -> type[Exception]:
    """The HTTP library's class for an unusable address, which it does not count as a failed request."""
    invalid: type[Exception] = import_module(network_error().__module__.partition(".")[0]).InvalidURL
    return invalid


def back_off(failures: int, error: BaseException) -> None:
    """Wait before a retry: PAUSE, doubled each time up to 8 s, or the time that the server asks for, up to 30 s."""
    requested = error.wait if isinstance(error, TransientError) else 0.0
    time.sleep(max(min(8.0, PAUSE * 2.0 ** (failures - 1)), min(30.0, requested)))


def retry(work: Callable[[], Any]) -> Any:
    """Return the result of `work`, retried while its failures are transient."""
    failures = 0
    while True:
        try:
            return work()
        except Exception as error:
            failures += 1
            if not is_transient(error) or failures >= ATTEMPTS:
                raise
            back_off(failures, error)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _etag(text: str | None) -> str | None:
    return None if text is None else text.removeprefix("W/").strip('"')


@dataclass
class RemoteFile:
    """A file of a repository at one commit. `label` names it in messages; `headers` carry the token, if there is one.

    `link` is the target of the Hub's last redirect, with the headers to send there: no token goes to another host.
    """

    label: str
    url: str
    etag: str
    size: int
    headers: Mapping[str, str]
    timeout: float
    link: tuple[str, Mapping[str, str]] | None = None

    def fetch(
        self, partial: PartialFile, ranges: Iterable[Range], advance: Callable[[int], None], *, prefix: bool = False
    ) -> None:
        """Fetch ranges into `partial`, whose exclusive lock is held; `advance` gets every count of bytes received.

        With `prefix`, the beginning of a file is accepted even from a server without range support. Such a server sends
        the whole file, and the connection is closed once enough of it has arrived.

        Raises RangesUnsupported, SourceChanged, MachineError, and huggingface_hub's errors.
        """
        uncommitted = 0
        try:
            for start, stop in coalesce(partial.missing(ranges), GAP, self.size // WASTE):
                failures = 0
                while start < stop:
                    try:
                        with closing(self._stream(start, stop, prefix)) as chunks:
                            for chunk in chunks:
                                partial.write(start, chunk)
                                start, uncommitted, failures = start + len(chunk), uncommitted + len(chunk), 0
                                advance(len(chunk))
                                if uncommitted >= COMMIT:
                                    partial.commit()
                                    uncommitted = 0
                    except Exception as error:
                        failures += 1
                        if not is_transient(error):
                            raise
                        if failures >= ATTEMPTS:
                            if not isinstance(error, TransientError):
                                raise
                            raise MachineError(
                                f"{self.label}: bytes {start} to {stop} could not be fetched in {failures} tries "
                                f"({error}); try again later: what was fetched is kept"
                            ) from error
                        back_off(failures, error)
        finally:
            partial.commit()

    def _stream(self, start: int, stop: int, prefix: bool) -> Generator[bytes, None, None]:
        """Yield chunks from `start` to `stop`, or to an earlier end if the server says so."""
        from huggingface_hub.utils import get_session

        url, headers = self.link or (self.url, self.headers)
        for _ in range(REDIRECTS):
            sent = {**headers, "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
            session = get_session()
            with session.stream("GET", url, headers=sent, follow_redirects=False, timeout=self.timeout) as response:
                if response.status_code not in _MOVED or "location" not in response.headers:
                    yield from self._body(response, start, stop, prefix)
                    return
                self._check_etag(response.headers.get("x-linked-etag"))
                target = self._target(url, response.headers["location"])
            if _origin(target) != _origin(url):
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            url = target
            self.link = (url, headers) if _origin(url) != _origin(self.url) else None
        raise MachineError(f"{self.label}: more than {REDIRECTS} redirects; is HF_ENDPOINT right?")

    def _target(self, url: str, location: str) -> str:
        """Return a redirect's target; MachineError for an invalid address, or for one that leaves HTTP or HTTPS."""
        with suppress(ValueError):
            target = urljoin(url, location)
            scheme, host, _ = _origin(target)
            if host and (scheme == "https" or scheme == urlsplit(url).scheme == "http"):
                return target
        raise MachineError(
            f"{self.label}: the server redirects to an address that cannot be used; is HF_ENDPOINT right?"
        )

    def _body(self, response: Any, start: int, stop: int, prefix: bool) -> Iterator[bytes]:
        from huggingface_hub.utils import hf_raise_for_status

        status = response.status_code
        if status in _TRANSIENT:
            retry_after = response.headers.get("retry-after", "")
            seconds = float(retry_after) if retry_after.isdecimal() else 0.0
            raise TransientError(f"the server answered {status}", seconds)
        if self.link is not None and status in _EXPIRED:
            self.link = None
            raise TransientError(f"the storage server answered {status}")
        hf_raise_for_status(response)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise TransientError("the server answered in an encoding, asked for none")
        if self.link is None:
            self._check_etag(response.headers.get("x-linked-etag") or response.headers.get("etag"))
        if status == 200:
            if not (prefix and start == 0):
                raise RangesUnsupported
            end = stop
        elif status == 206:
            end = self._end(response.headers.get("content-range", ""), start, stop)
        else:
            raise TransientError(f"the server answered {status}, expected 206")
        for chunk in response.iter_raw():
            if start == end:  # only checked on the next chunk: a body read to its end leaves the connection usable
                return
            chunk = chunk[: end - start]
            if chunk:
                yield chunk
            start += len(chunk)
        if start < end:
            raise TransientError(f"the connection ended at byte {start}, expected {end}")

    def _end(self, content_range: str, start: int, stop: int) -> int:
        """Return the end of a 206's body. The body must begin at `start` and belong to a file of the known size."""
        span, _, size = content_range.removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        digits = all(text.isdecimal() and len(text) <= MAX_DIGITS for text in (first, last))
        if not (digits and int(first) == start and start <= int(last) < stop):
            raise TransientError(f"the server answered with another range than {start} to {stop}")
        if size not in (str(self.size), "*"):
            raise SourceChanged(f"{self.label} has no longer {self.size} bytes on the Hub; run the merge again")
        return int(last) + 1

    def _check_etag(self, header: str | None) -> None:
        if header is not None and _etag(header) != self.etag:
            raise SourceChanged(f"{self.label} changed on the Hub while it was fetched; run the merge again")
