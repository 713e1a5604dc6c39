"""The command `hsa release`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import RELEASE
from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.system.streams import print_stderr, stderr_is_terminal

if TYPE_CHECKING:
    from hsa.methods.tensors import Summary
    from hsa.releases.plan import ReleasePlan
    from hsa.releases.release import EntryReport, ReleaseReport

ACTIONS = {"build": "build", "verify": "verify", "rebuild": "build anew", "refuse": "leave, and fail"}


@options.declares(after=lambda: list(options.run(RELEASE.declared_options())))
def release(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file; docs/release.md says what is in it.")],
    output: Annotated[str, typer.Option(metavar="TREE", help="Directory of the tree, new or of an earlier run.")],
    ray: options.Ray = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> int:
    """Build TREE/<group>/<name> for each merge of a recipe, and an index. Finished merges are verified."""
    from hsa.releases.plan import plan_release
    from hsa.releases.release import release as build_release

    settings = options.given(ctx, values)
    if dry_run:
        plan = plan_release(recipe, output, **settings)
        printing.result(plan.as_dict() if as_json else _describe_plan(plan), quiet)
        return 0
    with _Screen(
        bars=stderr_is_terminal() and not (quiet or as_json or ray is not None), quiet=quiet or as_json
    ) as screen:
        progress = screen.step if screen.bars else None
        report = build_release(
            recipe, output, progress=progress, watch=screen.done, ray=options.ray_address(ray), **settings
        )
    printing.findings(Findings(report.notes), quiet=quiet)
    if report.index_problem is not None:
        printing.problem(f"the index: {report.index_problem}")
    printing.result(
        report.as_dict() if as_json else _describe(report),
        quiet,
        done=f"the tree {report.tree} is whole" if report.ok else "",
    )
    return report.exit_code


class _Screen:
    """What is shown while entries are built: a bar for each on a terminal, a line for each that ends."""

    def __init__(self, *, bars: bool, quiet: bool) -> None:
        self.bars, self._quiet = bars, quiet
        self._bar = ExitStack()
        self._path: str | None = None
        self._update: Any = None
        self._ended = 0

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.close()
        if kind is not None and self._ended and not issubclass(kind, Exception):
            print_stderr(f"hsa: note: {self._ended} merges ended before and stand; run again to go on")

    def step(self, path: str, done: int, total: int) -> None:
        if path != self._path:
            self._bar.close()
            self._path = path
            self._update = self._bar.enter_context(printing.progress(show=True, label=one_line(path)))
        self._update(done, total)

    def done(self, entry: EntryReport) -> None:
        self._bar.close()
        self._path = None
        self._ended += 1
        if entry.problem is not None:
            printing.problem(f"{entry.path}: {entry.problem}")
        notes, warnings = (entry.notes, ()) if entry.merge is None else (entry.merge.notes, entry.merge.warnings)
        labelled = [tuple(f"{entry.path}: {text}" for text in texts) for texts in (notes, warnings)]
        printing.findings(Findings(*labelled), quiet=self._quiet)
        if not self._quiet and entry.problem is None:
            print_stderr(one_line(f"hsa: {entry.path}: {_result(entry)}"))


def _result(entry: EntryReport) -> str:
    if entry.merge is None:
        return f"stands and is as the recipe says ({size_text(entry.bytes_read)} read)"
    merge, extent = entry.merge, entry.merge.extent
    built = f"built, {extent.counted}, {size_text(merge.bytes_written)} written in {merge.seconds:.2f} s"
    return f"{built}; {extent.text}" if extent.text != extent.headline else built


def _planned(extent: Summary) -> str:
    return extent.headline if extent.text == extent.headline else f"{extent.text}, in {extent.tensors} tensors"


def _describe(report: ReleaseReport) -> str:
    built, verified, failed = map(report.count, ("built", "verified", "failed"))
    total = len(report.entries)
    if verified == total and not report.index_written and report.ok:
        summary = f"nothing to do: all {total} merges stand, verified, and so does the index"
    else:
        index = "index written" if report.index_written else "index unchanged"
        summary = f"{built} built, {verified} verified, {failed} failed of {total} merges; {index}"
    lines = [f"{report.tree}", f"  {summary}"]
    lines += [f"  failed: {entry.path}" for entry in report.failed]
    if report.failed:
        lines.append("  mend what the errors name and run again: what stands is kept")
    return "\n".join(map(one_line, lines))


def _describe_plan(plan: ReleasePlan) -> str:
    lines = [f"{plan.tree} (dry run: nothing was written)"]
    for entry_plan in plan.entries:
        merge_plan = entry_plan.plan
        lines.append(f"  {entry_plan.entry.path}: {ACTIONS[entry_plan.action]}")
        if entry_plan.why:
            remedy = f"; {entry_plan.remedy}" if entry_plan.remedy else ""
            lines.append(f"    why     {entry_plan.why}{remedy}")
        if entry_plan.action in ("build", "rebuild"):
            lines.append(f"    merge   {_planned(merge_plan.extent)}, {merge_plan.route} route")
            lines.append(f"    write   {size_text(merge_plan.bytes_to_write)}")
            if merge_plan.bytes_to_fetch:
                lines.append(f"    fetch   {size_text(merge_plan.bytes_to_fetch)} of weights from the Hub")
        lines += [f"    note    {note}" for note in merge_plan.notes]
        lines += [f"    warning {warning}" for warning in merge_plan.warnings]
    fetch = f", {size_text(plan.bytes_to_fetch)} fetched at most" if plan.bytes_to_fetch else ""
    lines.append(
        f"  in all {len(plan.building)} of {len(plan.entries)} to build, {size_text(plan.bytes_to_write)}{fetch}"
    )
    lines += [f"  note    {note}" for note in plan.notes]
    lines += [f"  warning {warning}" for warning in plan.short]
    return "\n".join(map(one_line, lines))
