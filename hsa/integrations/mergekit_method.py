"""The merge method `hsa` for mergekit: the models' roles, one tensor's arithmetic, and the object that mergekit calls.

mergekit calls objects that merge a group of tensors: the same tensor of every model, in the models' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hsa.actions.mergekit_config.roles import assign
from hsa.architectures.registry import architecture_of, not_with_heads
from hsa.backends.base import NotFinite, TaskBuffers
from hsa.backends.cpu import CpuWorker
from hsa.errors import NonFiniteError, RequestError, SourceError
from hsa.methods.base import BASE
from hsa.methods.hsa import PRIMARY, TARGET, Hsa, HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.settings import declared
from hsa.methods.tensors import Outcome
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.tasks import COUNTS, TaskFinder
from hsa.sources.checkpoint import CONFIG, Checkpoint
from hsa.sources.identity import Identity, escaped_name
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import NAMES, Array, size
from hsa.system.fsio import Tally

if TYPE_CHECKING:
    import torch

METHOD = "hsa"
PRETTY_NAME = "Headwise Selective Attention"

DEFAULTS: dict[str, Any] = {each.key: each.default for each in declared(HsaSettings) if each.about.axis}
"""The method's own parameters."""


def config_of(parameters: Mapping[str, Any], weights: Sequence[float] = ()) -> HsaSettings:
    """Check the parameters under mergekit's names; `weights` are those of the secondaries, if given.

    Raises RequestError.
    """
    values = {**DEFAULTS, **{key: parameters[key] for key in DEFAULTS if key in parameters}}
    return HsaSettings.from_dict(values if set(weights) <= {1.0} else {**values, "weights": list(weights)})


class Merging:
    """Merges tensor by tensor, and keeps the outcomes. Models are identified by mergekit's references."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.shares: list[float] = []
        self._configs: dict[Any, Mapping[str, Any]] = {}

    def forget(self) -> None:
        """Reset the state for another run, since files may have changed."""
        self.outcomes.clear()
        self.shares.clear()
        self._configs.clear()

    def config(self, role: str, model: Any) -> Mapping[str, Any]:
        """A model's config.json. Raises SourceError if it cannot be read or its family is not supported."""
        if model not in self._configs:
            if not (hasattr(model, "config") and hasattr(model, "model")):
                raise RequestError(
                    f"merge_method {METHOD} reads head and layer counts from the models' config.json, and {role} is "
                    f"no checkpoint (a {type(model).__name__}); use hsa.Merger for tensors in memory"
                )
            place = Path(model.model.path)
            if place.is_dir() and not (place / CONFIG).is_file():  # transformers may guess a config from the path
                raise SourceError(f"{role}: {place} has no {CONFIG}, which says how many heads and layers there are")
            try:
                config: Mapping[str, Any] = model.config().to_dict()
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise SourceError(f"{role}: the config.json of {model} cannot be read: {reason}") from error
            where = f"{role} {model}"
            family = architecture_of(config)
            if not family.has_heads:
                raise not_with_heads(config, where)
            family.counts(config, where)
            self._configs[model] = config
        return self._configs[model]

    def tensor(
        self, name: str | None, config: HsaSettings, models: Mapping[Role, Any], tensors: Mapping[Any, torch.Tensor]
    ) -> torch.Tensor:
        """One tensor of the output: merged if it is a target, else primary's own.

        Args:
            name: the name of the output's tensor.
            models: the models by role, base first. `tensors` holds each model's tensor of that name; all have the same
                shape, and may be on any device.

        Returns a tensor of primary's dtype, on primary's device. Raises RequestError, SourceError, MismatchError,
        NonFiniteError.
        """
        import torch

        from hsa.backends.resident import CODE_OF, bytes_of

        primary = tensors[models[PRIMARY]]
        if name is None:
            raise RequestError(f"merge_method {METHOD} needs the names of tensors, to know targets and layers")
        configs = {role: self.config(role, model) for role, model in models.items()}
        families = {role: architecture_of(configs[role]) for role in models}
        projection = families[PRIMARY].target(name, config.targets)
        if projection is None:
            return primary
        on_cpu = {role: tensors[model].detach().cpu().contiguous() for role, model in models.items()}

        def checkpoint(role: Role) -> Checkpoint:
            tensor = on_cpu[role]
            code = CODE_OF.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            nbytes = tensor.numel() * size(code) if code in NAMES else 0
            ref = TensorRef(name, code, tuple(tensor.shape), 0, 0, nbytes)
            path = Path(str(models[role]))
            identity, places = Identity(escaped_name(path.name)), {projection.name: ref}
            return Checkpoint(role, path, identity, configs[role], families[role], Tally(), tensors=places)

        sources = Sources.of_checkpoints(map(checkpoint, models))
        method = method_named(METHOD)
        task = TaskFinder(method, config, sources).task(projection.name, projection, TARGET)
        assert task is not None
        out = torch.empty_like(on_cpu[PRIMARY])
        raw: dict[Role, Array] = {role: bytes_of(tensor) for role, tensor in on_cpu.items()}
        try:
            merged = CpuWorker(method, config).merge(TaskBuffers(task, raw, bytes_of(out)))
        except NotFinite as error:
            raise _not_finite(error, name, sources, task.out_code) from None
        self.shares.append(config.of("k", task.name))
        self.outcomes.append(Outcome(task, merged.decision, merged.changed, {}, equal_pairs(task, raw)))
        return out.to(primary.device)


def _not_finite(error: NotFinite, name: str, sources: Sources, code: str) -> NonFiniteError:
    head = "" if error.group is None else f", head {error.group}"
    if error.role is None:
        belong = f"do the {COUNTS[len(sources.roles)]} models belong together?"
        return NonFiniteError(f"tensor {name}{head}: the result overflows {code}; {belong}")
    where = f"{error.role} {sources.of(error.role).path}: tensor {name}{head}"
    return NonFiniteError(f"{where} holds NaN or Inf; a merge with it would be damaged, use a sound checkpoint")


# --- mergekit's interface ---------------------------------------------------------------------------------------


def register(merging: Merging) -> None:
    """Register the method with the installed mergekit. Raises RequestError if it has no interface for methods."""
    try:
        from mergekit import merge_methods

        merge_methods.register(_group_method(merging))
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"the installed mergekit has no interface for methods that is known here ({error}); install one that "
            f'fits: pip install "hsa-merge[mergekit]"'
        ) from error


def _group_method(merging: Merging) -> Any:
    from mergekit.merge_methods import GroupMergeMethod, InputContract, MergeMethodSpec, ParameterScope
    from mergekit.merge_methods.base import BasePolicy, ParameterSpec
    from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

    shared = [
        ParameterSpec(name, type(default), ParameterScope.SHARED, default=default) for name, default in DEFAULTS.items()
    ]
    role = ParameterSpec("role", str | None, ParameterScope.NON_BASE, default=None)
    weight = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)

    class HsaMethod(GroupMergeMethod):  # type: ignore[misc]
        spec = MergeMethodSpec(
            name=METHOD,
            pretty_name=PRETTY_NAME,
            parameters=(*shared, role, weight),
            contract=InputContract(
                base=BasePolicy.REQUIRED, min_non_base=Hsa.contract.least, max_non_base=Hsa.contract.most
            ),
            uses_accelerator=False,
        )

        def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
            roles, by_model = parameters.pop("role"), parameters.pop("weight")
            others = assign([(entry.id, roles[entry.id]) for entry in group.non_base])
            weights = [by_model[model] for role, model in others.items() if role != PRIMARY]
            tensors = {entry.id: entry.tensor for entry in group.entries}
            config = config_of(parameters, weights)
            return merging.tensor(group.metadata.name, config, cast(Any, {BASE: group.base.id, **others}), tensors)

        def _execute(
            self, groups: Any, parameters: Any, options: Any, *, input_dtypes: Any, out_dtype: Any = None
        ) -> tuple[torch.Tensor, ...]:
            """Merge the groups without promoting all inputs to one dtype; results have primary's dtype."""
            results = []
            for group, values, dtype in zip(groups, parameters, input_dtypes, strict=True):
                cast_first = dtype != promoted_dtype(group)
                result = self.merge_group(align_dtype(group, dtype) if cast_first else group, **values)
                results.append(result if out_dtype is None else result.to(out_dtype))
            return tuple(results)

    return HsaMethod()
