"""`Merger`: keep the target tensors of the sources in memory, for many merges with different parameters.

What a method measures does not depend on its settings (HSA's scores do not depend on k, lambda or alpha), so it is
measured once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hsa.actions.keywords import EVERY, MERGER, Arguments, Call, candidate, candidate_settings, split
from hsa.actions.merge import run_merge
from hsa.actions.merger.loaded_models import LoadedTensor, Model
from hsa.actions.merger.read_sources import SourceTargets, checked_model, read_sources, share_config
from hsa.actions.merger.shared_tensors import SharedTensors
from hsa.actions.merger.spot_check import differing_tensors, sample_model
from hsa.actions.merger.writable_targets import WritableTargets
from hsa.actions.request import Request
from hsa.actions.signatures import declared_keywords, documented
from hsa.architectures.base import Preset
from hsa.backends.base import Backend, changed_ranges
from hsa.backends.choose import resolve
from hsa.backends.resident import CpuResident, Resident
from hsa.backends.sampling import source_sums
from hsa.errors import RequestError, one_line, shown, warn
from hsa.findings import Findings
from hsa.methods.copied import COPIED, untouched_groups
from hsa.methods.hsa import Hsa, HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.settings import PerTensor, Settings
from hsa.methods.tensors import Outcome, TensorTask
from hsa.outputs.earlier_merges import merged_base_findings, repeated_merge_findings
from hsa.outputs.merge_warnings import adapter_findings
from hsa.outputs.recording import tensors_digest
from hsa.outputs.report import MergeReport
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.plan import check_heads, check_structure
from hsa.planning.tasks import Targets, TaskFinder, find_targets
from hsa.planning.tensor_digests import tensor_digest
from hsa.sources.hub.client import Hub
from hsa.sources.roles import BASE, Role
from hsa.sources.source_set import Sources
from hsa.system.dtypes import NAMES, Array
from hsa.system.fsio import map_os_errors
from hsa.system.signals import deferred
from hsa.system.threads import check_threads, default_threads
from hsa.system.types import PathLike

CHECK, MERGE, APPLY = candidate("Merger.check"), candidate("Merger.merge"), candidate("Merger.apply_")
SAVE = candidate("Merger.save", EVERY - MERGER.options)


@documented(MERGER)
class Merger:
    """Merges of the same sources under many parameters, from target tensors kept in memory.

    Each source is a checkpoint directory (or a file or adapter that `hsa.merge` takes), an id on the Hub (`org/name`,
    `org/name@revision`), a state dict, or a loaded Whisper model. Their target tensors are copied, so that a source may
    be changed later, or be the model that `apply_` writes to. A method without targets merges every floating-point
    tensor, and all of them are kept in memory.

    Args:
        {sources}
        method: the name of the method. Each method takes its own settings. The settings that decide which tensors are
            merged, or from what, are given here; the others are given to `merge`, `apply_`, `check` and `save`.
        {settings}
        backend, device: where to compute, as for `hsa.merge`; `device="cuda"` keeps the targets on that GPU, where
            writing into a model on the same device allocates nothing after the first call with that model.
        threads: worker threads on the CPU, 1 to 256; by default the usable cores plus one.

    HSA needs `num_heads` and `num_layers` if all of its sources are state dicts, which say nothing about heads.

    `backend` and `device` are those that were chosen. `notes` are about the sources. `warnings` are possible mistakes:
    sources that are swapped, given twice, not of one base or already merged, and a model written to whose other tensors
    are not the anchor's. Each warning is also issued as an HsaWarning, which Python's filters can turn into an error.

    Merged values are those of `hsa.merge` with exact numerics, bit for bit, whatever torch's default device and grad or
    inference mode are.

    Raises:
        RequestError: an argument is out of range; a source is neither a path nor a model nor a state dict, holds PEFT
            adapters, or has a target that is not a plain tensor with data (on the meta device, offloaded, quantised,
            distributed, sparse) or that appears under two names.
        SourceError, MismatchError, NonFiniteError, BackendUnavailable, MachineError: as for `hsa.merge`.

    Example:
        >>> from transformers import WhisperForConditionalGeneration
        >>> model = WhisperForConditionalGeneration.from_pretrained("m1")
        >>> merger = hsa.Merger("whisper-small", "m1", "m2")
        >>> for lam in (0.1, 0.5, 0.9):
        ...     model = merger.apply_(model, lam=lam)  # then measure the model
    """

    @declared_keywords(MERGER)
    @map_os_errors()
    def __init__(self, *sources: Any, **keywords: Any) -> None:
        self._open(split(MERGER, sources, keywords), SharedTensors())

    @classmethod
    @map_os_errors()
    def sharing(cls, shared: SharedTensors, *sources: Any, **keywords: Any) -> Merger:
        """A Merger of these arguments that takes the tensors of checkpoints from `shared`, or reads them into it.

        Mergers of one set of sources by several methods then keep each tensor in memory once. Raises as `Merger`.

        Example:
            >>> shared = SharedTensors()  # doctest: +SKIP
            >>> ties = hsa.Merger.sharing(shared, method="ties", base="b", models=["m1", "m2"])  # doctest: +SKIP
        """
        merger = cls.__new__(cls)
        merger._open(split(MERGER, sources, keywords), shared)
        return merger

    def _open(self, arguments: Arguments, shared: SharedTensors) -> None:
        settings = method_named(arguments.method).Settings(**arguments.settings)
        self._run = {"backend": "auto", "device": "auto", "threads": None, **arguments.options}
        if isinstance(self._run["device"], torch.device):
            self._run["device"] = str(self._run["device"])
        check_threads(self._run["threads"])
        models = len(arguments.sources) - (BASE in arguments.sources)
        settings.check_models(models)
        chosen = resolve(self._run["backend"], self._run["device"], settings, models)
        self.backend, self.device = chosen.name, chosen.device
        self._given: Mapping[Role, PathLike | None] = {
            role: source if isinstance(source, (str, os.PathLike)) else None
            for role, source in arguments.sources.items()
        }
        hub = Hub()
        by_role = _read(arguments.sources, settings, hub, shared)
        data = {role: source.data for role, source in by_role.items()}
        self._sources = Sources.of_checkpoints(source.checkpoint for source in by_role.values())
        self._other_samples = by_role[self._sources.anchor].others
        self.notes = [*hub.notes, *(note for source in self._sources for note in source.notes)]
        self._targets = find_targets(method_named(settings.method), settings.for_all_candidates(), self._sources)
        tasks = self._targets.tasks
        _refuse_more_than_targets(self._targets, self._sources)
        if self._given[self._sources.anchor] is not None:
            check_structure(settings, self._sources)
        elif self._sources.base is not None and getattr(settings, "num_heads", None) is None:
            check_heads(self._sources)
        self._preset: Preset | None = getattr(settings, "targets", None)
        self._stored = {task.name: task.stored.name for task in tasks}
        self._resident = _make_resident(chosen, data, self._targets, self._run["threads"] or default_threads())
        self._measured = self._resident.measure()
        self._equal = {
            task.name: equal_pairs(task, {role: data[role][task.name] for role in task.sources}) for task in tasks
        }
        self._sums = {
            task.name: source_sums(task, {role: data[role][task.name] for role in task.sources}) for task in tasks
        }
        self._writable = WritableTargets(tasks, self._sources.architecture, self._preset)
        merges = {
            role: source_targets.earlier_merge
            for role, source_targets in by_role.items()
            if source_targets.earlier_merge is not None
        }
        findings = (
            adapter_findings(self._sources)
            + merged_base_findings(merges, self._sources)
            + (self._targets.method.source_findings(self._outcomes(self._targets)))
        )
        findings += repeated_merge_findings(
            merges, self._sources, settings, lambda role: _targets_digest(role, data[role], tasks)
        )
        self.warnings = [
            *(text for source_targets in by_role.values() for text in source_targets.warnings),
            *findings.warnings,
        ]
        for text in self.warnings:
            warn(text)

    def __repr__(self) -> str:
        named = ", ".join(f"{source.role} {source.identity.id}" for source in self._sources)
        of = f"method {self._targets.method.name}" if self._preset is None else self._preset
        what = f"{len(self._stored)} targets of {of}"
        return one_line(f"<hsa.Merger of {named}: {what}, in memory of {self.device}, backend {self.backend}>")

    @property
    def targets(self) -> tuple[TensorTask, ...]:
        """The tensors that a merge computes, in the order of the anchor's files; every candidate has the same."""
        return self._targets.tasks

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        """The saliency scores of every target: float32 [H] by tensor name. RequestError for methods other than HSA."""
        self._require_hsa("scores")
        return {
            stored: torch.tensor(measured.squared, dtype=torch.float64, device="cpu").sqrt().float()
            for stored, measured in zip(self._stored.values(), self._measured, strict=True)
        }

    def selected(self, k: PerTensor = HsaSettings.k) -> dict[str, tuple[int, ...]]:
        """The heads that an HSA merge with this `k` blends, by tensor name. Raises RequestError."""
        self._require_hsa("selected")
        return {
            outcome.task.stored.name: outcome.decision.selected
            for outcome in self._outcomes(self._with(MERGE, (), {"k": k}))
        }

    @declared_keywords(CHECK)
    def check(self, *arguments: Any, **values: Any) -> Findings:
        """Findings about a merge with these parameters, without making it.

        {settings}

        `notes` say how much is merged; `warnings` say if the output would be almost primary. Mistakes in the sources,
        which do not depend on the parameters, are in `Merger.warnings`. Raises RequestError.
        """
        outcomes = self._outcomes(self._with(CHECK, arguments, values))
        method = self._targets.method
        return Findings(notes=(method.summary(outcomes).text,)) + method.result_findings(outcomes)

    @declared_keywords(MERGE)
    def merge(self, *arguments: Any, **values: Any) -> dict[str, torch.Tensor]:
        """The merged target tensors by name, new on every call, on the CPU: shapes and dtypes are the anchor's.

        {settings}

        Raises RequestError for values out of range, NonFiniteError for a merged value that overflows.
        """
        targets = self._with(MERGE, arguments, values)
        with torch.inference_mode(False):  # so that a caller can use the tensors outside of it
            out = [
                torch.empty(task.shape, dtype=getattr(torch, NAMES[task.out_code]), device="cpu")
                for task in targets.tasks
            ]
        self._resident.write(targets.settings, out)
        return {task.stored.name: tensor for task, tensor in zip(targets.tasks, out, strict=True)}

    @declared_keywords(APPLY)
    def apply_(self, model: Model, *arguments: Any, **values: Any) -> Model:
        """Write the merged targets into a loaded model or a state dict, in place, and return it.

        {settings}

        Every target is written whole, from the sources alone: what the model held there before does not matter. The
        values are rounded once to the dtype of the model's own tensors, which stay the same objects; autograd sees that
        they changed. Tensors that are not targets are left as they are, so the model should be the anchor's. When a
        model is first seen, up to 32 elements of each of these tensors are compared with the anchor's; if some differ,
        an HsaWarning says so.

        The write is atomic: either all targets are written or none. After one of the errors below, the model is
        unchanged. An interrupt (Ctrl-C) during the write takes effect when all targets are written. Only if the machine
        itself fails halfway, for example out of memory, a MachineError says that some targets are written.

        Raises:
            RequestError: a parameter is out of range; `model` is neither a model nor a state dict, holds PEFT adapters,
                or has a target that is not a plain float32, float16 or bfloat16 tensor with data (see `Merger`), that
                has several elements at one address (as after `expand`), or that shares memory with another tensor of
                the model (tied, overlapping).
            MismatchError: a target is missing from the model or has another shape.
            NonFiniteError: a merged value overflows the dtype of the model.
        """
        targets = self._with(APPLY, arguments, values)
        out, record = self._writable.find(model, self._warn_of_other_tensors)
        with deferred():
            self._resident.write(targets.settings, out)
            record.update(out)
        return model

    @declared_keywords(SAVE)
    def save(self, output: PathLike, *arguments: Any, **values: Any) -> MergeReport:
        """Write the merge with these parameters as `hsa.merge` does, byte for byte, and return its report.

        {settings}
        {options}

        The sources are read again. Raises RequestError if one of them was given as a model or a state dict, which have
        no files to take the rest of the output from. Also raises what `hsa.merge` raises.
        """
        paths = {role: path for role, path in self._given.items() if path is not None}
        in_memory = [role for role in self._given if role not in paths]
        if in_memory:
            raise RequestError(
                f"save writes the files of a checkpoint from those of its sources, and {in_memory[0]} was given as a "
                f"model or state dict; give directories or ids on the Hub, or call apply_ and save the model"
            )
        options = {name: values.pop(name) for name in SAVE.options & values.keys()}
        settings = self._with(SAVE, arguments, values).settings
        return run_merge(Request(paths, output, settings, **{**self._run, **options}))

    def _with(self, call: Call, positional: Sequence[Any], values: Mapping[str, Any]) -> Targets:
        """The targets under the settings that a call is given; their plan stays as it is."""
        settings = self._targets.settings
        changed = candidate_settings(call, type(settings), positional, values)
        candidate = replace(settings, **changed)
        candidate.require()
        return self._targets.with_settings(candidate)

    def _require_hsa(self, name: str) -> None:
        method = self._targets.method
        if not isinstance(method, Hsa):
            raise RequestError(f"method {method.name} scores no heads, so a Merger of it has no {name}; use check")

    def _outcomes(self, targets: Targets) -> list[Outcome]:
        """The outcomes of merging these targets, from the measurements alone.

        They have no digests, and no decisions while a setting is missing.
        """
        method, outcomes, settings = targets.method, [], targets.settings
        for task, measured in zip(targets.tasks, self._measured, strict=True):
            decision = None
            if measured is COPIED:
                decision = COPIED
            elif settings.complete:
                decision = method.decide(task, measured, settings, None)
            changed = changed_ranges(task, untouched_groups(method, task.partition.groups, decision))
            outcomes.append(Outcome(task, decision, changed, {}, self._equal[task.name], self._sums[task.name]))
        return outcomes

    def _warn_of_other_tensors(self, entries: Sequence[LoadedTensor]) -> None:
        """Warn if a model's other tensors are not primary's."""
        difference = differing_tensors(self._other_samples, sample_model(entries, self._stored))
        if difference is None:
            return
        more = f", as do {difference.count - 1} more" if difference.count > 1 else ""
        anchor = self._sources.anchor
        note = (
            f"the model's other tensors are not {anchor}'s: {difference.name} {difference.how}{more} of "
            f"{difference.compared}, and apply_ leaves them as they are; load {anchor} and apply to it for the model "
            f"that hsa.merge writes"
        )
        self.warnings.append(note)
        warn(note)


def _read(
    sources: Mapping[Role, Any], settings: Settings, hub: Hub, shared: SharedTensors
) -> dict[Role, SourceTargets]:
    """Read the targets of the sources; a source without a config takes that of another."""
    preset: Preset | None = getattr(settings, "targets", None)
    counts = (getattr(settings, name, None) for name in ("num_heads", "num_layers"))
    by_role, config_owner = share_config(
        read_sources(sources, preset, hub, shared), *counts, by_heads=preset is not None
    )
    return {
        role: source if isinstance(sources[role], (str, os.PathLike)) else checked_model(source, config_owner)
        for role, source in by_role.items()
    }


def _refuse_more_than_targets(targets: Targets, sources: Sources) -> None:
    """Raise RequestError for settings that change tensors other than targets, which a Merger leaves as they are in a
    model, and for methods that work on whole tensors."""
    method, finder = targets.method, TaskFinder(targets.method, targets.settings, sources)
    if not method.elementwise:
        raise RequestError("a Merger keeps exact numerics in memory; use hsa.merge for numerics 'reference'")
    for name, ref in sources.anchor_checkpoint.tensors.items():
        treatment = finder.treatment(name, ref)
        if treatment.kind == "merge" and not treatment.listed:
            raise RequestError(
                f"{treatment.needed_by} changes {shown(ref.name)}, and a Merger writes target tensors alone; use "
                f"hsa.merge"
            )


def _make_resident(
    backend: Backend, data: Mapping[Role, Mapping[str, Array]], targets: Targets, threads: int
) -> Resident:
    if backend.name == "triton":
        from hsa.backends.triton import TritonResident

        return TritonResident(targets, data, backend.device)
    return CpuResident(targets, data, threads)


def _targets_digest(role: Role, data: Mapping[str, Array], tasks: Sequence[TensorTask]) -> str:
    """The digest of a source's target tensors, as a record has it."""
    return tensors_digest(
        [
            (task.name, task.sources[role].code, task.sources[role].shape, tensor_digest(task, role, data[task.name]))
            for task in tasks
        ]
    )
