"""The structure of mergekit's YAML: models, slices and modules, whose parameters are not yet interpreted.

Like mergekit, this turns every file into modules of slices of sources: `models` are one slice of all layers, and
`slices` or `models` without `modules` are one module. Keys that mergekit ignores are ignored too, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from hsa.actions.mergekit_config.config_request import Model, ModelName
from hsa.actions.mergekit_config.nodes import Node, given
from hsa.errors import listed, shown

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "residual_weight", "parameters")
MODULE_KEYS = ("slices", "models", "parameters")

MAX_LAYERS = 10_000
"""The largest end of a layer range: work grows with it before any model is looked at."""

Parameters = Mapping[str, Node]


@dataclass(frozen=True)
class Source:
    """A model of a slice. `layers` is the range of its layers, without its end; None for all layers."""

    node: Node
    model: Model
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True)
class Slice:
    """The sources of consecutive layers of the output."""

    node: Node
    sources: tuple[Source, ...]
    parameters: Parameters


@dataclass(frozen=True)
class Module:
    """The slices of a stack of layers of the output; `name` is None if the file has no modules."""

    node: Node
    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters


@dataclass(frozen=True)
class Document:
    """A mergekit file. `keys` are all its keys with their values."""

    node: Node
    keys: Mapping[str, Node]
    method: str
    base: Model | None
    modules: tuple[Module, ...]
    parameters: Parameters
    warnings: list[str] = field(default_factory=list)

    @property
    def slices(self) -> Iterator[Slice]:
        for module in self.modules:
            yield from module.slices

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model of the slices once, in the order written."""
        return tuple(dict.fromkeys(source.model for each in self.slices for source in each.sources))


def read_document(node: Node) -> Document:
    """The structure of a document. Raises RequestError if mergekit would not accept it."""
    keys = node.mapping()
    warnings = list(_unknown(node, keys, KEYS))
    method = given(keys, "merge_method")
    if method is None:
        raise node.error("has no merge_method; name one, such as merge_method: linear")
    base = None if (base_node := given(keys, "base_model")) is None else read_model(base_node)
    modules = tuple(_modules(node, keys, base, warnings))
    return Document(node, keys, method.text("the name of a merge method"), base, modules, _parameters(keys), warnings)


# --- models -----------------------------------------------------------------------------------------------------------


def read_model(node: Node) -> Model:
    """A model as mergekit writes it: `PATH` or `PATH@REVISION`, optionally with `+ADAPTER` behind it, or a mapping."""
    if not isinstance(node.value.content, Mapping):
        parts = node.text("a directory or a hub id").split("+")
        if len(parts) > 2:
            raise node.error(f"is {node.shown()}, with more than one '+'; expected MODEL or MODEL+ADAPTER")
        return Model(*(_name(node, part) for part in parts))
    keys = node.mapping()
    for key, each in keys.items():
        if key not in ("model", "lora") and not each.is_null:
            hint = "; the architecture is read from config.json" if key == "override_architecture" else ""
            raise each.error(f"is not supported; expected model and lora{hint}")
    if given(keys, "model") is None:
        raise node.error("has no model; write the path or the hub id itself")
    lora = given(keys, "lora")
    return Model(_named(keys["model"]), None if lora is None else _named(lora))


def _named(node: Node) -> ModelName:
    """A path with a revision, as a text or as a mapping of both."""
    if not isinstance(node.value.content, Mapping):
        return _name(node, node.text("a directory or a hub id"))
    keys = node.mapping()
    path = given(keys, "path")
    if path is None:
        raise node.error("has no path; name a directory or a hub id")
    revision = given(keys, "revision")
    return ModelName(
        path.text("a directory or a hub id"), None if revision is None else revision.text("a branch, tag or commit")
    )


def _name(node: Node, text: str) -> ModelName:
    if text.count("@") > 1:
        raise node.error(
            f"is {shown(text)}, with more than one '@'; write such a path as model: {{model: {{path: ...}}}}"
        )
    path, _, revision = text.partition("@")
    if not path.strip():
        raise node.error(f"is {node.shown()}, which names no model; expected a directory or a hub id")
    return ModelName(path, revision or None)


# --- modules, slices and sources --------------------------------------------------------------------------------------


def _modules(node: Node, keys: Mapping[str, Node], base: Model | None, warnings: list[str]) -> Iterator[Module]:
    what = [key for key in ("models", "slices", "modules") if key in keys and not keys[key].is_empty]
    if len(what) != 1:
        found = listed(what) if what else "none of them"
        raise node.error(f"must have one of models, slices and modules, got {found}")
    if what[0] != "modules":
        yield Module(node, None, tuple(_slices(keys[what[0]], base, warnings)), {})
        return
    for name, module in keys["modules"].mapping("a module's name to its slices or models").items():
        own = module.mapping()
        warnings += _unknown(module, own, MODULE_KEYS)
        inside = [key for key in ("models", "slices") if key in own and not own[key].is_empty]
        if len(inside) != 1:
            raise module.error(f"must have either models or slices, got {listed(inside) if inside else 'neither'}")
        yield Module(module, name, tuple(_slices(own[inside[0]], base, warnings)), _parameters(own))


def _slices(node: Node, base: Model | None, warnings: list[str]) -> Iterator[Slice]:
    if node.path.rpartition(".")[2] == "models":
        yield Slice(node, tuple(_sources(node, warnings, whole=True)), {})
        return
    for each in node.items("slices"):
        keys = each.mapping()
        warnings += _unknown(each, keys, SLICE_KEYS, ignored=("residual_weight",))
        own_base = given(keys, "base_model")
        if own_base is not None and read_model(own_base) != base:
            raise own_base.error(
                "differs from base_model of the whole merge; give one base for all, or run hsa mergekit"
            )
        if "sources" not in keys:
            raise each.error("has no sources; expected a list of models, each with a layer_range")
        sources = tuple(_sources(keys["sources"], warnings, whole=False))
        if not sources:
            raise keys["sources"].error("is empty; expected a list of models, each with a layer_range")
        _check_lengths(sources)
        yield Slice(each, sources, _parameters(keys))


def _sources(node: Node, warnings: list[str], *, whole: bool) -> Iterator[Source]:
    seen: dict[Model, str] = {}
    for each in node.items("models"):
        keys = each.mapping()
        known = ("model", "parameters") if whole else SOURCE_KEYS
        warnings += _unknown(each, keys, known)
        if given(keys, "model") is None:
            raise each.error("has no model; name a directory or a hub id")
        model = read_model(keys["model"])
        if model in seen:
            raise keys["model"].error(f"is {shown(str(model))}, which {seen[model]} is too; name each model once")
        seen[model] = each.path
        layers = None if whole else _layers(each, keys)
        yield Source(each, model, layers, _parameters(keys))


def _layers(node: Node, keys: Mapping[str, Node]) -> tuple[int, int]:
    if given(keys, "layer_range") is None:
        raise node.error("has no layer_range; write [FIRST, END], counted from 0, END not among them")
    layers = keys["layer_range"]
    values = tuple(layers.value.plain()) if isinstance(layers.value.content, tuple) else ()
    if len(values) != 2 or any(type(each) is not int for each in values):
        raise layers.error(f"must be two whole numbers, [FIRST, END], got {shown(layers.value.plain())}")
    first, end = values
    if not 0 <= first < end <= MAX_LAYERS:
        raise layers.error(
            f"is {shown(list(values))}; expected [FIRST, END] with 0 <= FIRST < END <= {MAX_LAYERS}, END not among "
            f"the layers"
        )
    return first, end


def _check_lengths(sources: Iterable[Source]) -> None:
    first, *others = sources
    for source in others:
        if _count(source) != _count(first):
            raise source.node.error(
                f"takes {_count(source)} layers and {first.node.path} {_count(first)}; every model of a slice gives "
                f"as many"
            )


def _count(source: Source) -> int:
    return 0 if source.layers is None else source.layers[1] - source.layers[0]


def _parameters(keys: Mapping[str, Node]) -> Parameters:
    node = given(keys, "parameters")
    return {} if node is None else node.mapping("parameters to values")


def _unknown(node: Node, keys: Mapping[str, Node], known: Iterable[str], ignored: Iterable[str] = ()) -> Iterator[str]:
    """Warnings about keys that mergekit ignores."""
    for key, each in keys.items():
        if key in known and key not in ignored:
            continue
        near = get_close_matches(key, [name for name in known if name not in ignored], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and not ignored and re.fullmatch(r"weight|density|lambda|t|normalize|gamma|epsilon", key):
            hint = "; parameters belong under the key parameters"
        yield f"{each.place} is ignored, as mergekit ignores it{hint}"
