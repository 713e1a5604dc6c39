"""The merge method `hsa` for mergekit: who is who, one tensor's arithmetic, and mergekit's two ways to hold a method.

mergekit 0.1.5 takes objects that merge a group of tensors; 0.1.4 takes objects that make a task of its graph, and keeps
no order of the models. What the installed one has is looked at, not its version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from hsa.architectures import whisper
from hsa.architectures.base import Preset
from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuWorker
from hsa.errors import NonFiniteError, RequestError, SourceError, shown
from hsa.methods.config import MergeConfig
from hsa.option_names import as_keys, spelled
from hsa.planning.likeness import equal_pairs
from hsa.planning.outcome import TargetOutcome
from hsa.planning.plan import make_target
from hsa.sources.checkpoint import CONFIG, Checkpoint
from hsa.sources.identity import Identity, readable
from hsa.sources.roles import ROLES, Role
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import NAMES, Array, size
from hsa.system.fsio import Tally

if TYPE_CHECKING:
    import torch

METHOD = "hsa"
PRETTY_NAME = "Headwise Selective Attention"
ROLE_CODES = {"base": 0.0, "primary": 1.0, "secondary": 2.0}
PRESET_CODES = {preset: float(number) for number, preset in enumerate(get_args(Preset))}
"""Numbers for the texts of a document, for a mergekit whose documents hold numbers alone."""

DEFAULTS: dict[str, Any] = {"k": 0.6, "lambda": 0.5, "alpha": 0.2, "targets": "encoder-qkv"}
"""The method's own parameters."""

M = TypeVar("M")


def assign(others: Sequence[tuple[M, object]], *, ordered: bool) -> dict[Role, M]:
    """Which of the models besides base is primary and which secondary.

    Args:
        others: each model with the role that its parameters name, or None. A single name settles both.
        ordered: whether their order is that of the YAML, so that without names the first is primary.

    Raises RequestError.
    """
    if len(others) != 2:
        raise RequestError(
            f"merge_method {METHOD} merges two models besides base_model, primary and secondary, got {len(others)}"
        )
    for model, role in others:
        if role not in (None, "primary", "secondary"):
            raise RequestError(f"the role of {model} is {shown(role)}, expected primary or secondary")
    (first, one), (second, two) = others
    if one is None and two is None and not ordered:
        raise RequestError(
            "this mergekit keeps no order of models, so say which is which: parameters: {role: primary} under one "
            "model and parameters: {role: secondary} under the other"
        )
    if one is not None and one == two:
        raise RequestError(f"{first} and {second} both have the role {one}; one must be primary, the other secondary")
    swapped = one == "secondary" or two == "primary"
    return {"primary": second, "secondary": first} if swapped else {"primary": first, "secondary": second}


def config_of(parameters: Mapping[str, Any]) -> MergeConfig:
    """The parameters under mergekit's names, checked. Raises RequestError."""
    found = {**DEFAULTS, **parameters}
    with spelled(as_keys(DEFAULTS)):
        return MergeConfig(k=found["k"], lam=found["lambda"], alpha=found["alpha"], targets=found["targets"])


def takes_text() -> bool:
    """Whether the installed mergekit's documents may hold texts as parameters."""
    from mergekit.config import InputModelDefinition

    try:
        InputModelDefinition.model_validate({"model": "name", "parameters": {"role": "primary"}})
    except ValueError:
        return False
    return True


def in_numbers(document: Mapping[str, Any]) -> dict[str, Any]:
    """A checked document with numbers in the place of roles and presets; `HsaTask` reads them back."""

    def coded(setting: Any, codes: Mapping[str, float]) -> Any:
        if isinstance(setting, list):
            return [coded(part, codes) for part in setting]
        if isinstance(setting, dict):
            return {**setting, "value": coded(setting.get("value"), codes)}
        return codes.get(setting, setting)

    def entry(given: Mapping[str, Any]) -> dict[str, Any]:
        parameters = {name: coded(value, ROLE_CODES) for name, value in (given.get("parameters") or {}).items()}
        return {**given, "parameters": {name: value for name, value in parameters.items() if value is not None}}

    found = {**document, "models": [entry(given) for given in document["models"]]}
    if "targets" in (document.get("parameters") or {}):
        parameters = document["parameters"]
        found["parameters"] = {**parameters, "targets": coded(parameters["targets"], PRESET_CODES)}
    return found


def _named(value: Any, codes: Mapping[str, float]) -> Any:
    return next((name for name, code in codes.items() if code == value), value)


class Merging:
    """Merges tensor by tensor, and remembers what it merged. The models are mergekit's references."""

    def __init__(self) -> None:
        self.outcomes: list[TargetOutcome] = []
        self._configs: dict[Any, Mapping[str, Any]] = {}

    def forget(self) -> None:
        """Begin anew: another run, with files that may have changed."""
        self.outcomes.clear()
        self._configs.clear()

    def config(self, role: str, model: Any) -> Mapping[str, Any]:
        """A model's config.json. Raises SourceError where it cannot be read or is not Whisper's."""
        if model not in self._configs:
            if not (hasattr(model, "config") and hasattr(model, "model")):
                raise RequestError(
                    f"merge_method {METHOD} reads head and layer counts from the models' config.json, and {role} is "
                    f"no checkpoint (a {type(model).__name__}); use hsa.Merger for tensors in memory"
                )
            place = Path(model.model.path)
            if place.is_dir() and not (place / CONFIG).is_file():  # transformers may guess one from the path's name
                raise SourceError(f"{role}: {place} has no {CONFIG}, which says how many heads and layers there are")
            try:
                found: Mapping[str, Any] = model.config().to_dict()
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise SourceError(f"{role}: the config.json of {model} cannot be read: {reason}") from error
            whisper.architecture(found, f"{role} {model}")
            self._configs[model] = found
        return self._configs[model]

    def tensor(
        self, name: str | None, config: MergeConfig, models: Mapping[Role, Any], tensors: Mapping[Any, torch.Tensor]
    ) -> torch.Tensor:
        """One tensor of the output: merged where it is a target, else primary's own.

        Args:
            name: of the output's tensor.
            models: by role; `tensors` holds each model's tensor of that name, of one shape, anywhere.

        Returns a tensor of primary's dtype, on primary's device. Raises RequestError, SourceError, MismatchError,
        NonFiniteError.
        """
        import torch

        from hsa.backends.resident import CODE_OF, bytes_of

        primary = tensors[models["primary"]]
        if name is None:
            raise RequestError(f"merge_method {METHOD} needs the names of tensors, to know targets and layers")
        projection = whisper.parse(name)
        if projection is None or not whisper.is_target(projection, config.targets):
            return primary
        held = {role: tensors[models[role]].detach().cpu().contiguous() for role in ROLES}

        def checkpoint(role: Role) -> Checkpoint:
            tensor = held[role]
            code = CODE_OF.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            nbytes = tensor.numel() * size(code) if code in NAMES else 0
            ref = TensorRef(name, code, tuple(tensor.shape), 0, 0, nbytes)
            path = Path(str(models[role]))
            found = self.config(role, models[role])
            return Checkpoint(role, path, Identity(readable(path.name)), found, Tally(), tensors={projection.name: ref})

        sources = Sources(checkpoint("base"), checkpoint("primary"), checkpoint("secondary"))
        shapes = {source.role: whisper.architecture(source.config, source.role) for source in sources}
        target = make_target(projection, config, sources, shapes)
        out = torch.empty_like(held["primary"])
        raw: dict[Role, Array] = {role: bytes_of(held[role]) for role in ROLES}
        try:
            merged = CpuWorker().merge(target, raw["base"], raw["primary"], raw["secondary"], bytes_of(out))
        except NotFinite as error:
            raise _not_finite(error, name, sources, target.out_code) from None
        self.outcomes.append(TargetOutcome(target, merged, {}, equal_pairs(target, raw)))
        return out.to(primary.device)


def _not_finite(error: NotFinite, name: str, sources: Sources, code: str) -> NonFiniteError:
    head = "" if error.head is None else f", head {error.head}"
    if error.role is None:
        return NonFiniteError(f"tensor {name}{head}: the result overflows {code}; do the three models belong together?")
    where = f"{error.role} {sources.of(error.role).path}: tensor {name}{head}"
    return NonFiniteError(f"{where} holds NaN or Inf; a merge with it would be damaged, use a sound checkpoint")


# --- mergekit's two interfaces ----------------------------------------------------------------------------------


def takes_groups() -> bool:
    """Whether the installed mergekit registers methods that merge groups, which keep the models' order."""
    from mergekit import merge_methods

    return hasattr(merge_methods, "register") and hasattr(merge_methods, "GroupMergeMethod")


def register(merging: Merging) -> None:
    """Give the installed mergekit the method. Raises RequestError where it has neither interface."""
    if takes_groups():
        from mergekit import merge_methods

        merge_methods.register(_group_method(merging))
        return
    try:
        from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS

        REGISTERED_MERGE_METHODS[METHOD] = _class_method(merging)
    except ImportError as error:
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

    class HsaMethod(GroupMergeMethod):  # type: ignore[misc]
        spec = MergeMethodSpec(
            name=METHOD,
            pretty_name=PRETTY_NAME,
            parameters=(*shared, role),
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2, max_non_base=2),
            uses_accelerator=False,
        )

        def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
            roles = parameters.pop("role")
            others = [(entry.id, roles[entry.id]) for entry in group.non_base]
            models = {"base": group.base.id, **assign(others, ordered=True)}
            tensors = {entry.id: entry.tensor for entry in group.entries}
            return merging.tensor(group.metadata.name, config_of(parameters), cast(Any, models), tensors)

        def _execute(
            self, groups: Any, parameters: Any, options: Any, *, input_dtypes: Any, out_dtype: Any = None
        ) -> tuple[torch.Tensor, ...]:
            """Without widening all inputs to one dtype: the result has primary's."""
            results = []
            for group, given, dtype in zip(groups, parameters, input_dtypes, strict=True):
                cast_first = dtype != promoted_dtype(group)
                result = self.merge_group(align_dtype(group, dtype) if cast_first else group, **given)
                results.append(result if out_dtype is None else result.to(out_dtype))
            return tuple(results)

    return HsaMethod()


def _class_method(merging: Merging) -> Any:
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.graph import Task
    from mergekit.merge_methods.base import ConfigParameterDef, MergeMethod, MergeTensorInput

    class HsaTask(Task):  # type: ignore[misc]
        gather_tensors: MergeTensorInput
        weight: WeightInfo
        base_model: ModelReference
        parameters: ImmutableMap[str, Any]
        tensor_parameters: ImmutableMap[ModelReference, Any]

        def uses_accelerator(self) -> bool:
            return False

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.gather_tensors}

        def group_label(self) -> Any:
            return self.gather_tensors.group_label()

        def execute(self, tensors: Mapping[Any, torch.Tensor]) -> torch.Tensor:
            roles = {model: _named(self.tensor_parameters[model]["role"], ROLE_CODES) for model in tensors}
            others = [(model, role) for model, role in roles.items() if model != self.base_model]
            found = dict(self.parameters.items())
            found["targets"] = _named(found["targets"], PRESET_CODES)
            models = {"base": self.base_model, **assign(others, ordered=False)}
            return merging.tensor(self.weight.name, config_of(found), cast(Any, models), tensors)

    class HsaMethod(MergeMethod):  # type: ignore[misc]
        def name(self) -> str:
            return METHOD

        def pretty_name(self) -> str:
            return PRETTY_NAME

        def parameters(self) -> list[Any]:
            return [ConfigParameterDef(name=name, default_value=default) for name, default in DEFAULTS.items()]

        def tensor_parameters(self) -> list[Any]:
            return [ConfigParameterDef(name="role")]

        def make_task(
            self, *, output_weight: Any, tensors: Any, parameters: Any, tensor_parameters: Any, base_model: Any
        ) -> Any:
            return HsaTask(
                gather_tensors=tensors,
                weight=output_weight,
                base_model=base_model,
                parameters=parameters,
                tensor_parameters=tensor_parameters,
            )

    return HsaMethod()
