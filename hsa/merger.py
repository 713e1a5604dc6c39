"""`Merger`: the target tensors of three sources, resident, for many merges with other parameters.

Scores do not depend on lambda or alpha, and the ranking of heads not on k: they are computed once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hsa.backends import Backend, resolve
from hsa.backends.resident import CODE_OF, CpuResident, Resident, bytes_of
from hsa.checkpoint import ROLES, Checkpoint, Identity, Role, Sources, TensorRef
from hsa.config import MergeConfig, PerTensor, Preset
from hsa.dtypes import CODES, NAMES, Array, size
from hsa.errors import MismatchError, RequestError
from hsa.fsio import Tally
from hsa.hub import Hub, Want
from hsa.option_names import option
from hsa.plan import check_heads, check_whole, find_targets
from hsa.structure import require_shapes
from hsa.target import Target, select
from hsa.threads import check_threads, default_threads
from hsa.whisper import MODEL_TYPE, canonical, is_known, is_target, parse, plain_names

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module
Model = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Held:
    """A source's targets: what a plan needs to know of them, and their bytes by canonical name."""

    checkpoint: Checkpoint
    data: Mapping[str, Array]


class Merger:
    """Merges of three sources under many parameters, from target tensors kept in memory.

    Args:
        base, primary, secondary: each a checkpoint directory (or a file or adapter that `hsa.merge` takes), an id on
            the Hub (`org/name`, `org/name@revision`), a state dict, or a loaded Whisper model. Their target tensors are
            copied, so that a source may be changed, or be the model that `apply_` writes to.
        targets: `encoder-qkv`, `attention-qkv` or `attention-all`.
        attention_scale: factor on the task vectors of the targets.
        num_heads, num_layers: instead of what the configs say, for both stacks; needed where all three are state
            dicts, which say nothing of heads.
        backend, device: where to compute, as for `hsa.merge`; `device="cuda"` keeps the targets on that GPU, where
            writing into a model on the same device allocates nothing after the first call with that model.
        threads: worker threads on the CPU; by default the usable cores and one more.

    `backend` and `device` are what was chosen, `notes` what should be known of the sources.

    Merged values are those of `hsa.merge` with exact numerics, bit for bit.

    Raises RequestError, SourceError, MismatchError (also where primary, given as a directory or hub id, does not hold
    what its config.json promises), NonFiniteError, BackendUnavailable.
    Source: SPEC sections 1, 2 and 5.
    """

    def __init__(
        self,
        base: Source,
        primary: Source,
        secondary: Source,
        *,
        targets: Preset = "encoder-qkv",
        attention_scale: float = 1.0,
        num_heads: int | None = None,
        num_layers: int | None = None,
        backend: str = "auto",
        device: str | torch.device = "auto",
        threads: int | None = None,
    ) -> None:
        self._config = MergeConfig(
            targets=targets, attention_scale=attention_scale, num_heads=num_heads, num_layers=num_layers
        )
        check_threads(threads)
        chosen = resolve(backend, str(device) if isinstance(device, torch.device) else device, self._config)
        self.backend, self.device = chosen.name, chosen.device
        given: dict[Role, Source] = {"base": base, "primary": primary, "secondary": secondary}
        hub = Hub()
        held = {role: _hold(role, given[role], targets, hub, base) for role in ROLES}
        self.notes = (*hub.notes, *(note for each in held.values() for note in each.checkpoint.notes))
        _lend_config(held, num_heads, num_layers)
        data = {role: held[role].data for role in ROLES}
        self._sources = Sources(*(held[role].checkpoint for role in ROLES))
        self._targets = find_targets(self._config, self._sources)
        if isinstance(primary, (str, os.PathLike)):
            check_whole(self._config, self._sources)
        elif num_heads is None:
            check_heads(self._sources)
        self._stored = {target.projection.name: target.primary.name for target in self._targets}
        self._resident = _make_resident(chosen, data, self._targets, default_threads() if threads is None else threads)
        self._squared = dict(zip(self._stored, self._resident.score(self._targets), strict=True))

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        """The saliency scores of every target: float32 [H] by tensor name."""
        return {
            self._stored[name]: torch.tensor(squared, dtype=torch.float64).sqrt().float()
            for name, squared in self._squared.items()
        }

    def selected(self, k: PerTensor = 0.6) -> dict[str, tuple[int, ...]]:
        """The heads that a merge with this `k` blends, by tensor name."""
        return {target.primary.name: self._select(target) for target in self._with(k, 0.5, 0.2)}

    def merge(self, k: PerTensor = 0.6, lam: PerTensor = 0.5, alpha: PerTensor = 0.2) -> dict[str, torch.Tensor]:
        """The merged target tensors by name, new on every call: shapes and dtypes are primary's.

        `k`, `lam` and `alpha` are numbers, or mappings from every target's name to a number.
        """
        out = {
            target.primary.name: torch.empty(target.shape, dtype=getattr(torch, NAMES[target.out_code]))
            for target in self._targets
        }
        self._write(out, self._with(k, lam, alpha))
        return out

    def apply_(self, model: Model, k: PerTensor = 0.6, lam: PerTensor = 0.5, alpha: PerTensor = 0.2) -> Model:
        """Write the merged targets into a loaded model or a state dict, in place, and return it.

        Every target is written whole, from the sources alone: what the model held there before does not matter.
        Tensors that are no target are left as they are, so the model should be primary's. The values are rounded
        once to the dtype of the model's own tensors.

        Raises MismatchError when a target is missing from the model or has another shape.
        """
        held = _state_dict(model)
        by_name = {canonical(name): tensor for name, tensor in held.items()}
        if any(target.projection.name not in by_name for target in self._targets):
            by_name = {canonical(name): held[stored] for stored, name in plain_names(held).items()}
        out: dict[str, torch.Tensor] = {}
        for target in self._targets:
            tensor = by_name.get(target.projection.name)
            if tensor is None or tuple(tensor.shape) != target.shape:
                found = "nothing" if tensor is None else list(tensor.shape)
                raise MismatchError(
                    f"target tensor {target.primary.name} of shape {list(target.shape)}: the model holds {found}"
                )
            if tensor.dtype not in CODE_OF:
                raise MismatchError(
                    f"target tensor {target.primary.name}: the model's dtype is {tensor.dtype}, expected one of "
                    f"{', '.join(CODES)}"
                )
            out[target.primary.name] = tensor
        self._write(out, self._with(k, lam, alpha))
        return model

    def _with(self, k: PerTensor, lam: PerTensor, alpha: PerTensor) -> tuple[Target, ...]:
        config = MergeConfig(
            k,
            lam,
            alpha,
            self._config.targets,
            self._config.attention_scale,
            num_heads=self._config.num_heads,
            num_layers=self._config.num_layers,
        )
        return find_targets(config, self._sources)

    def _select(self, target: Target) -> tuple[int, ...]:
        return select(self._squared[target.projection.name], target.keep).selected

    def _write(self, out: Mapping[str, torch.Tensor], targets: Sequence[Target]) -> None:
        self._resident.write(targets, [out[target.primary.name] for target in targets])


def _make_resident(
    backend: Backend, data: Mapping[Role, Mapping[str, Array]], targets: Sequence[Target], threads: int
) -> Resident:
    if backend.name == "triton":
        from hsa.backends.triton import TritonResident

        return TritonResident(data, targets, backend.device)
    return CpuResident(data, threads)


def _state_dict(model: Model) -> Mapping[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if isinstance(model, Mapping):
        return model
    raise RequestError(f"expected a loaded model or a state dict, got {type(model).__name__}")


def _hold(role: Role, source: Source, preset: Preset, hub: Hub, base: Source) -> _Held:
    """Copy a source's targets; `base` is what an adapter stands on."""
    if isinstance(source, (str, os.PathLike)):
        with ExitStack() as stack:
            under = None
            if role != "base" and hub.is_adapter(role, source) and isinstance(base, (str, os.PathLike)):
                under = stack.enter_context(hub.open("base", base, Tally(), Want("targets", preset)))
            want = Want("whole" if role == "primary" else "targets", preset)
            checkpoint = stack.enter_context(hub.open(role, source, Tally(), want, None, under))
            data = {}
            for name, ref in checkpoint.tensors.items():
                if _wanted(name, preset):
                    data[name] = np.empty(ref.nbytes, np.uint8)
                    checkpoint.read_into(ref, data[name].data)
            checkpoint.check_unchanged()
            return _Held(checkpoint, data)
    tensors = _state_dict(source)
    refs: dict[str, TensorRef] = {}
    data = {}
    for stored, plain in plain_names(tensors).items():
        name, tensor = canonical(plain), tensors[stored]
        wanted = _wanted(name, preset)
        if wanted:
            _check_tensor(role, stored, tensor)
        elif not hasattr(tensor, "numel"):  # a training step's number and the like
            continue
        if wanted and name in refs:
            raise MismatchError(f"{role}: {refs[name].name} and {stored} are one tensor of Whisper, {name}; give one")
        code = CODE_OF.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        if wanted and code in NAMES:
            data[name] = bytes_of(tensor.detach().to("cpu", copy=True).contiguous())
        nbytes = tensor.numel() * size(code) if code in NAMES else 0
        refs[name] = TensorRef(stored, code, tuple(tensor.shape), 0, 0, nbytes)
    config = getattr(source, "config", None)
    known = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    label = "state dict" if isinstance(source, Mapping) else "model"
    checkpoint = Checkpoint(role, Path(label), Identity(label), known, Tally(), tensors=refs)
    if role == "primary" and known:
        require_shapes(checkpoint)
    # Names of Whisper that are not merged are left out: every plan goes through all that is here.
    checkpoint.tensors = {n: ref for n, ref in refs.items() if _wanted(n, preset) or not is_known(n)}
    return _Held(checkpoint, data)


def _check_tensor(role: Role, name: str, value: object) -> None:
    """RequestError unless a state dict holds a torch tensor under this name."""
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        remedy = "; convert it with torch.from_numpy" if kind is np.ndarray else ""
        raise RequestError(
            f"{role}: {name} is a {kind.__module__}.{kind.__name__}, expected a torch tensor in a state dict{remedy}"
        )


def _wanted(name: str, preset: Preset) -> bool:
    projection = parse(name)
    return projection is not None and is_target(projection, preset)


def _lend_config(held: Mapping[Role, _Held], num_heads: int | None, num_layers: int | None) -> None:
    """Give sources without a config another's; state dicts alone need both counts from the caller."""
    known = next((h.checkpoint.config for h in held.values() if h.checkpoint.config), None)
    if known is None:
        if num_heads is None or num_layers is None:
            raise RequestError(
                f"three state dicts say nothing of heads and layers: give {option('num_heads')} and "
                f"{option('num_layers')}, or one source as a directory or a model"
            )
        stacks = ("encoder", "decoder")
        known = {
            "model_type": MODEL_TYPE,
            **{f"{stack}_attention_heads": num_heads for stack in stacks},
            **{f"{stack}_layers": num_layers for stack in stacks},
        }
    for source in held.values():
        if not source.checkpoint.config:
            source.checkpoint.config = known
