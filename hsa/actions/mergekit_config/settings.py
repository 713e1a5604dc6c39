"""Read the settings of a method from the parameters in all scopes of a mergekit file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from hsa.actions.mergekit_config.config_request import Model
from hsa.actions.mergekit_config.document import Document, Slice, Source
from hsa.actions.mergekit_config.merge_methods import MergekitMethod, Parameter
from hsa.actions.mergekit_config.parameters import (
    Case,
    Part,
    ScopedParameter,
    chain,
    check_form,
    combined,
    read_parameter,
)
from hsa.actions.mergekit_config.parts import PartOfModel
from hsa.errors import RequestError


class SettingsReader:
    """Reads the settings of one document. `places` says where in the file each one is, `warnings` what is ignored."""

    def __init__(self, document: Document, method: MergekitMethod, parts: Sequence[PartOfModel]) -> None:
        self.document, self.method, self.parts = document, method, parts
        self.places: dict[str, str] = {}
        self.warnings: list[str] = []

    def read(self, models: Sequence[Model]) -> dict[str, Any]:
        """The settings of the method by their names in Python. Raises RequestError if one has no value."""
        settings: dict[str, Any] = {}
        for parameter in self.method.parameters:
            if parameter.scope == "shared":
                value = self._value(parameter, None)
            else:
                value = self._each(parameter, models)
            if value is not None and parameter.has_effect:
                settings[parameter.python] = value
            elif value is not None and parameter.kind == "number":
                place = self.places.pop(parameter.python)
                self.warnings.append(f"{place} changes nothing: method {self.method.name} takes task vectors whole")
        self._warn_of_ignored()
        return settings

    def _each(self, parameter: Parameter, models: Sequence[Model]) -> tuple[Any, ...] | None:
        """A value for each model; None where the file gives none and mergekit has a default."""
        values = [self._value(parameter, model) for model in models]
        if all(value is None for value in values):
            return None
        return tuple(parameter.default if value is None else value for value in values)

    def _value(self, parameter: Parameter, model: Model | None) -> Any:
        """The value of a parameter, for one model if each model has its own; None if the file does not set it."""
        by_part: list[tuple[Part, list[Case]]] = []
        is_set = False
        for each in self.parts:
            settings = list(self._scopes(parameter, model, each))
            is_set = is_set or bool(settings)
            cases = list(chain(settings, parameter.default))
            if parameter.required and not cases:
                raise self._missing(parameter, model, each.slice)
            by_part.append((each.part, cases))
        if not is_set:
            return None
        value = combined(by_part)
        self._check_constant(parameter, value)
        return value

    def _scopes(self, parameter: Parameter, model: Model | None, each: PartOfModel) -> Iterator[ScopedParameter]:
        """The settings of a parameter, from the narrowest scope to the widest."""
        scopes = [each.slice.parameters, each.module.parameters, self.document.parameters]
        if model is not None:
            own = (source.parameters for source in each.slice.sources if source.model == model)
            scopes = [*own, *scopes]
        for scope in scopes:
            if parameter.name in scope:
                setting = read_parameter(scope[parameter.name], parameter.kind)
                self.places.setdefault(parameter.python, setting.node.place)
                self.warnings += setting.warnings
                if setting.cases:
                    yield setting

    def _missing(self, parameter: Parameter, model: Model | None, each: Slice) -> RequestError:
        if model is None:
            return self.document.node.error(
                f"has no parameters.{parameter.name}, which method {self.method.name} needs"
            )
        source = next((one for one in each.sources if one.model == model), None)
        if source is None:  # base_model, which mergekit adds to the models
            return self.document.keys["base_model"].error(
                f"counts as one of the models of {self.method.name} and has no {parameter.name}: leave it out, or name "
                f"it among the models with parameters: {{{parameter.name}: ...}}"
            )
        return source.node.error(
            f"has no {parameter.name}, which method {self.method.name} needs for each model; write parameters: "
            f"{{{parameter.name}: ...}}"
        )

    def _check_constant(self, parameter: Parameter, value: Any) -> None:
        if parameter.has_effect and parameter.kind != "number" and isinstance(value, tuple):
            place = self.places[parameter.python]
            raise RequestError(f"{place} differs among tensors; {parameter.name} has one value for all here")

    def _warn_of_ignored(self) -> None:
        """Warn about parameters that mergekit does not read at that place, though it checks their form."""
        scopes = [scope for each in self.parts for scope in (each.module.parameters, each.slice.parameters)]
        for scope in (self.document.parameters, *scopes):
            for name, node in scope.items():
                check_form(node)
                if self.method.parameter(name) is None:
                    self.warnings.append(f"{node.place} is ignored: {self._no_parameter(name)}")
        for source in (source for each in self.parts for source in each.slice.sources):
            for name, node in source.parameters.items():
                check_form(node)
                reason = self._ignored_at(name, source)
                if reason:
                    self.warnings.append(f"{node.place} is ignored: {reason}")

    def _ignored_at(self, name: str, source: Source) -> str | None:
        """Why a parameter of a model is ignored; None where it is not."""
        parameter = self.method.parameter(name)
        if parameter is None:
            return self._no_parameter(name)
        if parameter.scope == "shared":
            return f"{name} is one value for all models; mergekit reads it from parameters of the slice or the file"
        if parameter.scope == "non_base" and source.model == self.document.base and name != "role":
            return "the model is base_model, which gives no task vector"
        return None

    def _no_parameter(self, name: str) -> str:
        names = [each.name for each in self.method.parameters]
        near = get_close_matches(name, names, n=1)
        return f"method {self.method.name} has no {name}" + (f"; did you mean {near[0]}?" if near else "")
