"""A merge that a mergekit file describes, in this package's terms. Imports no YAML parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hsa.findings import Findings
from hsa.methods.registry import method_named
from hsa.sources.roles import BASE, Role


@dataclass(frozen=True)
class ModelName:
    """A directory, or a model on the Hub, with a revision where one is given."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class Model:
    """A model of a document, perhaps with a LoRA adapter. As in mergekit, two are equal if all their strings are.

    Example:
        >>> str(Model(ModelName("org/tiny", "v1"), ModelName("adapters/children")))
        'org/tiny@v1+adapters/children'
    """

    name: ModelName
    lora: ModelName | None = None

    def __str__(self) -> str:
        return f"{self.name}+{self.lora}" if self.lora else str(self.name)


@dataclass(frozen=True)
class ConfigRequest:
    """A merge that a mergekit file describes.

    Args:
        where: what messages call the file.
        method: the name of the merge method.
        base: the model that task vectors are taken from; None where the method has none, or takes base_model as one of
            its models.
        models: those that are merged, in mergekit's order.
        settings: values of the method's settings by their names in Python. Each is a number, a flag, a string, or a
            list over layers or of filters. Settings that each model has for itself are lists, one entry per model.
        places: where in the file each setting is, for messages.
        dtype: of the output; `auto` if the file gives none.
        config_from: the model whose config.json and generation_config.json are the output's.
        tokenizer_from: the model whose tokenizer is the output's.
        same_vocabulary: whether the file builds the output's vocabulary from several tokenizers, which is possible here
            if all of them are the same.
        layers: the number of layers in the slices, by the name of the stack, or None for the only one; the models must
            have as many.
        modules: the names of the file's modules, if it has any.
        findings: notes, and warnings of what mergekit ignores in the file.
    """

    where: str
    method: str
    base: Model | None
    models: tuple[Model, ...]
    settings: Mapping[str, Any]
    places: Mapping[str, str]
    dtype: str
    config_from: Model
    tokenizer_from: Model
    same_vocabulary: bool = False
    layers: Mapping[str | None, int] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    findings: Findings = field(default_factory=Findings)

    def role_of(self, model: Model) -> Role:
        """The role that a model of the file has in the merge."""
        if model == self.base:
            return BASE
        return method_named(self.method).contract.roles(len(self.models))[self.models.index(model)]
