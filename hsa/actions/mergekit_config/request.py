"""Translate a mergekit file into this package's terms: method, models in order, settings, and where each comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hsa.actions.mergekit_config.config_request import ConfigRequest, Model
from hsa.actions.mergekit_config.document import Document, read_document, read_model
from hsa.actions.mergekit_config.merge_methods import METHODS, NOT_HERE, MergekitMethod
from hsa.actions.mergekit_config.nodes import RUN_MERGEKIT, Node, given
from hsa.actions.mergekit_config.parts import read_parts
from hsa.actions.mergekit_config.roles import assign
from hsa.actions.mergekit_config.settings import SettingsReader
from hsa.errors import RequestError, listed, shown
from hsa.findings import Findings
from hsa.system.fsio import SourceFile, Tally
from hsa.system.strict_yaml import parse
from hsa.system.types import PathLike

MAX_BYTES = 1 << 20
"""The size of the largest file that is read; mergekit's files take some kilobytes."""

DTYPES = ("float32", "float16", "bfloat16")


def load(path: PathLike) -> ConfigRequest:
    """Read a mergekit file, without opening any model.

    Raises SourceError if the file cannot be read. Raises RequestError, which names the line and the key, for what
    mergekit would refuse and for what cannot be done here.
    """
    where = Path(path)
    source = SourceFile(where, "config", Tally())
    try:
        if source.size > MAX_BYTES:
            raise RequestError(f"config {where} has {source.size} bytes, at most {MAX_BYTES} are read")
        data = source.read(source.size)
    finally:
        source.close()
    return loads(data, str(where))


def loads(data: bytes, where: str) -> ConfigRequest:
    """The request in the bytes of a file that messages call `where`; see `load`.

    Example:
        >>> text = b"{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 0.5}}"
        >>> loads(text, "c.yml").settings
        {'weights': (0.5, 0.5)}
    """
    document = read_document(Node(where, "", parse(data, where)))
    return _Reader(document, where).request()


class _Reader:
    """Reads one document."""

    def __init__(self, document: Document, where: str) -> None:
        self.document, self.where = document, where
        self.notes: list[str] = []
        self.method = self._method()

    def request(self) -> ConfigRequest:
        document = self.document
        self._refuse_unsupported()
        parts, layers = read_parts(document)
        base, models = self._models()
        settings = SettingsReader(document, self.method, parts)
        donor = document.base or document.models[0]
        tokenizer, same = self._tokenizer(donor)
        return ConfigRequest(
            where=self.where,
            method=self.method.name,
            base=base,
            models=models,
            settings=settings.read(models),
            places=settings.places,
            dtype=self._dtype(),
            config_from=models[0] if self.method.has_roles else donor,
            tokenizer_from=models[0] if self.method.has_roles and not same else tokenizer,
            same_vocabulary=same,
            layers=layers,
            modules=tuple(module.name for module in document.modules if module.name is not None),
            findings=Findings(tuple(self.notes), (*document.warnings, *settings.warnings)).once,
        )

    def _method(self) -> MergekitMethod:
        name, node = self.document.method, self.document.keys["merge_method"]
        if name in NOT_HERE:
            raise node.error(f"is {name}, which is mergekit's alone; {RUN_MERGEKIT}")
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {listed(METHODS)}"
            raise node.error(f"is {shown(name)}, which mergekit does not have{hint}")
        return METHODS[name]

    def _refuse_unsupported(self) -> None:
        for key in ("slices", "modules"):
            if self.method.has_roles and (node := given(self.document.keys, key)) is not None:
                raise node.error(
                    f"cannot be with merge_method {self.method.name}, which merges whole models; list them under models"
                )
        template = given(self.document.keys, "chat_template")
        if template is not None and not template.is_empty:
            raise template.error(
                f"is not supported, for tokenizers are copied as they are; leave it out and edit the output's, or "
                f"{RUN_MERGEKIT}"
            )

    # --- models -------------------------------------------------------------------------------------------------------

    def _models(self) -> tuple[Model | None, tuple[Model, ...]]:
        """Base, unless it is one of the merged models, and the merged models in mergekit's order."""
        document, method = self.document, self.method
        named = document.models
        base = document.base
        if base is not None and base not in named and self._has_whole_models():
            named = (*named, base)  # as mergekit adds it
        if method.base == "counts":
            self._check_count(named, method)
            if base is not None and base not in named:
                raise document.keys["base_model"].error(
                    f"is {shown(str(base))}, which no slice names; method {method.name} takes base_model for one of "
                    f"its models, so name it there or leave it out"
                )
            self._check_adapters(None)
            return None, named
        if base is None:
            if method.base == "required":
                raise document.node.error(f"has no base_model, which method {method.name} needs; name it")
        elif base not in named:
            raise document.keys["base_model"].error(
                f"is {shown(str(base))}, which no slice names; add it to the sources of each slice"
            )
        self._check_count(named if method.base == "required" else tuple(m for m in named if m != base), method)
        if base is not None and base.lora is not None:
            raise document.keys["base_model"].error(
                f"is {shown(str(base))}: base cannot be an adapter; save the model with the adapter merged into it"
            )
        self._check_adapters(base)
        others = tuple(model for model in named if model != base)
        return base, self._in_roles(others) if method.has_roles else others

    def _check_adapters(self, base: Model | None) -> None:
        """Raise RequestError for an adapter on a model other than base."""
        for source in (source for each in self.document.slices for source in each.sources):
            if source.model.lora is None or (base is not None and source.model.name == base.name):
                continue
            reason = "which is not base_model" if base is not None else f"and method {self.method.name} has no base"
            raise source.node.error(
                f"is an adapter on {shown(str(source.model.name))}, {reason}: adapters are read on base alone; save "
                f"the model with the adapter merged into it"
            )

    def _has_whole_models(self) -> bool:
        return any(source.layers is None for each in self.document.slices for source in each.sources)

    def _check_count(self, models: Sequence[Model], method: MergekitMethod) -> None:
        least, most = method.least, method.most
        if len(models) >= least and (most is None or len(models) <= most):
            return
        span = f"{least}" if least == most else f"at least {least}"
        names = {"required": "models, base among them", "counts": "models", "optional": "models besides base"}
        raise self.document.keys["merge_method"].error(
            f"is {method.name}, which takes {span} {names[method.base]}, got {len(models)}"
        )

    def _in_roles(self, others: tuple[Model, ...]) -> tuple[Model, ...]:
        """The models with primary before the secondaries, as their parameters say."""
        roles: dict[Model, tuple[Node, Any]] = {}
        for each in self.document.slices:
            for source in each.sources:
                node = given(source.parameters, "role")
                if node is not None:
                    roles[source.model] = node, node.value.plain()
        try:
            named = assign([(model, roles.get(model, (None, None))[1]) for model in others])
        except RequestError as error:
            first = next(iter(roles.values()), (self.document.keys["merge_method"], None))[0]
            raise RequestError(f"{first.place}: {error}") from error
        return tuple(named.values())

    # --- the output ---------------------------------------------------------------------------------------------------

    def _dtype(self) -> str:
        """The element type of the output, which is rounded once, from float32."""
        found = "auto"
        for key in ("dtype", "out_dtype"):
            node = given(self.document.keys, key)
            if node is None or node.is_empty:
                continue
            name = node.text(f"one of {', '.join(DTYPES)}").removeprefix("torch.")
            if name not in DTYPES:
                raise node.error(f"must be one of {', '.join(DTYPES)}, got {node.shown()}")
            found = name
            if key == "dtype" and name != "float32":
                self.notes.append(
                    f"{node.place} is {name}: mergekit casts every model before it merges; here all is computed in "
                    f"float32 and rounded once"
                )
        return found

    def _tokenizer(self, donor: Model) -> tuple[Model, bool]:
        """The model whose tokenizer the output has, and whether the file asks for a vocabulary built from several."""
        source = given(self.document.keys, "tokenizer_source")
        tokenizer = given(self.document.keys, "tokenizer")
        if source is not None and tokenizer is not None:
            raise tokenizer.error("cannot be combined with tokenizer_source; give one of them")
        if tokenizer is not None:
            keys = tokenizer.mapping()
            for key in ("tokens", "pad_to_multiple_of"):
                node = given(keys, key)
                if node is not None and not node.is_empty:
                    raise node.error(
                        f"is not supported, for vocabularies stay as they are; leave it out, or {RUN_MERGEKIT}"
                    )
            source = given(keys, "source")
            if source is None:
                return donor, True
        if source is None:
            return donor, False
        if source.value.content in ("base", "union"):
            return donor, True
        model = read_model(source)
        if model != donor and model not in self.document.models:
            raise source.error(
                f"is {shown(str(model))}, which is none of the models; expected base, union, or one of them"
            )
        return model, True


def path_of(model: Model) -> tuple[PathLike, str | None]:
    """What to open for a model, and a note or None.

    It is a path if something of that name exists, as in mergekit, otherwise a hub id with its revision.
    """
    name = model.lora or model.name
    if os.path.lexists(name.path):
        note = f"{name.path} exists here, so that its revision {name.revision} says nothing" if name.revision else None
        return Path(name.path), note
    return str(name), None
