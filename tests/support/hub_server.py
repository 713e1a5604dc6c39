"""A server on this machine with the Hub's URL scheme, and a second one that it redirects to for weights, as a CDN.

It knows repositories, revisions, private and gated ones, and can be told to fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretOfThisTest"
SIGNATURE = "SecretSignature"
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Repo:
    """A repository: revision name to commit, commit to a directory with its files."""

    revisions: dict[str, str]
    commits: dict[str, Path]
    private: bool = True
    gated: bool = False
    etags: dict[str, str] = field(default_factory=dict)

    def etag(self, path: Path) -> str:
        """By content, or for large files by size and time, as long as none is set for the name."""
        if path.name in self.etags:
            return self.etags[path.name]
        status = path.stat()
        text = path.read_bytes() if status.st_size < 1 << 20 else f"{status.st_size} {status.st_mtime_ns}".encode()
        return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A request as the servers saw it; `bytes` were sent of a file's content."""

    server: str
    method: str
    path: str
    range: tuple[int, int] | None
    authorized: bool
    bytes: int


Fault = Callable[["Handler"], bool]
"""Is asked for every GET on the CDN; True when it has answered."""


class Servers:
    """Both servers; `seen` is every request in order, `faults` are asked in order, each until it says True once.

    `api` is what the API answers about any model, `location` where weights are redirected to, and `linked_size` how
    large they are said to be, each instead of the truth.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, Path] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.ranges = True
        self.api: bytes | None = None
        self.location: str | None = None
        self.linked_size: str | None = None
        self.always: Fault | None = None
        self.lock = threading.Lock()
        self.hub = self._start("hub")
        self.cdn = self._start("cdn")

    def _start(self, name: str) -> ThreadingHTTPServer:
        handler = type(f"{name}Handler", (Handler,), {"servers": self, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def add(self, name: str, directory: Path, commit: str | None = None, **more: Any) -> Repo:
        commit = commit or hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo({"main": commit, "v1.0": commit}, {commit: directory}, **more)
        return self.repos[name]

    def of(self, server: str, method: str = "GET") -> list[Seen]:
        return [seen for seen in self.seen if (seen.server, seen.method) == (server, method)]

    def stop(self) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    servers: Servers
    name: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """Else every body waits 40 ms for the client to acknowledge the headers before it."""

    def log_message(self, *_: object) -> None:
        pass

    def note(self, count: int) -> None:
        if self.name == "hub" and not any(name in self.path for name in self.servers.repos):
            return  # what huggingface_hub asks for itself
        found = RANGE.fullmatch(self.headers.get("Range", ""))
        place = (int(found[1]), int(found[2]) + 1) if found else None
        with self.servers.lock:
            self.servers.seen.append(
                Seen(self.name, self.command, self.path, place, "Authorization" in self.headers, count)
            )

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.note(0)
        self.route()

    def do_GET(self) -> None:
        if self.name == "cdn":
            with self.servers.lock:
                fault = self.servers.always or (self.servers.faults[0] if self.servers.faults else None)
            if fault is not None and fault(self):
                with self.servers.lock:
                    if fault in self.servers.faults:
                        self.servers.faults.remove(fault)
                return
        self.route()

    def route(self) -> None:
        try:
            (self.serve_hub if self.name == "hub" else self.serve_blob)()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def serve_hub(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        repo = self.servers.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self.count_and_answer(
                404 if allowed else 401,
                json.dumps({"error": f"no {name} for {self.headers.get('Authorization')}"}).encode(),
                X_Error_Code="RepoNotFound",
                X_Error_Message=f"Repository not found for {self.headers.get('Authorization')}",
            )
            return
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            self.count_and_answer(404, X_Error_Code="RevisionNotFound")
            return
        directory = repo.commits[commit]
        if api and self.servers.api is not None:
            self.count_and_answer(200, self.servers.api, Content_Type="application/json")
            return
        if api:
            names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
            files = [{"rfilename": name} for name in names]
            document = {"id": name, "sha": commit, "siblings": files, "private": repo.private, "tags": []}
            self.count_and_answer(200, json.dumps(document).encode(), Content_Type="application/json")
            return
        if repo.gated:
            self.count_and_answer(403, X_Error_Code="GatedRepo", X_Repo_Commit=commit)
            return
        path = directory / unquote("/".join(rest[2:]))
        if not path.is_file():
            self.count_and_answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif path.suffix in (".safetensors", ".bin"):
            etag = repo.etag(path)
            self.servers.blobs[etag] = path
            self.count_and_answer(
                302,
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{etag}"',
                X_Linked_Size=self.servers.linked_size or str(path.stat().st_size),
                Location=self.servers.location
                or f"http://127.0.0.1:{self.servers.cdn.server_port}/blobs/{etag}?X-Amz-Signature={SIGNATURE}",
            )
        else:
            self.send_file(path, X_Repo_Commit=commit, ETag=f'"{repo.etag(path)}"')

    def count_and_answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.command == "GET":
            self.note(0)
        self.answer(status, body, **headers)

    def serve_blob(self) -> None:
        address = urlsplit(self.path)
        path = self.servers.blobs.get(address.path.rpartition("/")[2])
        if path is None or SIGNATURE not in address.query:
            self.count_and_answer(403)
        else:
            self.send_file(path, ETag='"of-the-storage"')

    def send_file(self, path: Path, **headers: str) -> None:
        size = path.stat().st_size
        found = RANGE.fullmatch(self.headers.get("Range", "")) if self.servers.ranges else None
        start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        self.send_response(206 if found else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.note(stop - start)
        with path.open("rb") as file:
            while start < stop:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, min(stop - start, 1 << 20))
                start += sent


def status_503(handler: Handler) -> bool:
    handler.note(0)
    handler.answer(503)
    return True


def cut_short(handler: Handler) -> bool:
    """Sends the first half of what was asked for, and hangs up."""
    found = RANGE.fullmatch(handler.headers.get("Range", ""))
    path = handler.servers.blobs[urlsplit(handler.path).path.rpartition("/")[2]]
    if found is None or int(found[1]) == 0:
        return False
    start, stop = int(found[1]), int(found[2]) + 1
    half = (stop - start) // 2
    handler.note(half)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{path.stat().st_size}")
    handler.send_header("Content-Length", str(stop - start))
    handler.end_headers()
    handler.wfile.write(path.read_bytes()[start : start + half])
    handler.close_connection = True
    return True


def slow(handler: Handler) -> bool:
    """Keeps the client waiting for longer than a patient one would."""
    time.sleep(2.5)
    handler.note(0)
    handler.close_connection = True
    return True


def wrong_range(handler: Handler) -> bool:
    """Answers with the bytes after those that were asked for."""
    found = RANGE.fullmatch(handler.headers.get("Range", ""))
    assert found is not None
    start, stop = int(found[1]) + 8, int(found[2]) + 9
    handler.note(0)
    handler.answer(206, b"\0" * (stop - start), Content_Range=f"bytes {start}-{stop - 1}/999999999")
    return True


@contextmanager
def running() -> Iterator[Servers]:
    servers = Servers()
    try:
        yield servers
    finally:
        servers.stop()
