"""The report of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hsa.errors import one_line
from hsa.outputs.record import Record
from hsa.verification.decisions import Answers
from hsa.verification.problems import Problem

ReportKind = Literal["output", "patch", "sweep", "release"]


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification.

    `kind` says what was verified: an `output`, a `patch`, or the directory of a `sweep` or a `release`, whose `members`
    are the reports of its points or outputs. `record` is the provenance. It is None if it cannot be read, and for
    directories of sweeps and releases. `files` counts the files whose bytes were read. `problems` includes those of the
    members, and is empty if everything is sound. `notes` are further remarks for the user.

    `sources_compared` says whether the merge was recomputed and compared. If it was, `bytes_follow` says whether the
    bytes of the weights follow from the recorded decisions, and `decisions_follow` whether these decisions follow from
    the sources. Otherwise both are None.

    Example:
        >>> report = hsa.verify("merged", base="whisper-small", primary="m1", secondary="m2")
        >>> report.ok, report.bytes_follow
        (True, True)
    """

    output: Path
    kind: ReportKind
    record: Record | None
    files: int
    bytes_read: int
    peak_memory_bytes: int
    seconds: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    answers: Answers | None = None
    members: tuple[VerifyReport, ...] = ()

    def __repr__(self) -> str:
        summary = f"sound, {self.files} files read"
        if self.problems:
            summary = f"not sound, {len(self.problems)} found wrong, {self.problems[0].file}: {self.problems[0].what}"
        return one_line(f"<hsa.VerifyReport of {self.kind} {self.output}: {summary}>")

    @property
    def sources_compared(self) -> bool:
        return self.answers is not None

    @property
    def bytes_follow(self) -> bool | None:
        return None if self.answers is None else self.answers.bytes_follow

    @property
    def decisions_follow(self) -> bool | None:
        return None if self.answers is None else self.answers.decisions_follow

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The report as `hsa verify --json` prints it."""
        record = self.record
        about: dict[str, Any] = {"parameters": None, "sources": None, "target_tensors": None}
        about |= {"selected_heads": None, "total_heads": None}
        if record is not None:
            about |= {
                "parameters": dict(record.parameters),
                "sources": {
                    role: {"id": source.identity.id, "revision": source.identity.revision}
                    for role, source in record.sources.items()
                },
                "target_tensors": len(record.targets),
                **record.method.recorded_summary(record.targets).counts(),
            }
        return {
            "output": str(self.output),
            "kind": self.kind,
            "ok": self.ok,
            "problems": [{"file": problem.file, "what": problem.what} for problem in self.problems],
            "notes": list(self.notes),
            "sources_compared": self.sources_compared,
            "bytes_follow": self.bytes_follow,
            "decisions_follow": self.decisions_follow,
            "files": self.files,
            "bytes_read": self.bytes_read,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": self.seconds,
            **about,
            "members": [member.as_dict() for member in self.members],
        }


@dataclass(frozen=True)
class VerifyResult:
    """The result of verifying one kind of target, without problems and notes; see VerifyReport."""

    record: Record | None
    files: int
    answers: Answers | None = None
    members: tuple[VerifyReport, ...] = ()
