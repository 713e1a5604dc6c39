"""Run mergekit with this package's merge as one of its methods.

    merge_method: hsa
    base_model: whisper-small
    models:
      - model: older-children
        parameters: {role: primary}
      - model: younger-children
        parameters: {role: secondary}
    parameters: {k: 0.6, lambda: 0.5, alpha: 0.2, targets: encoder-qkv}

mergekit does not discover methods from other packages. So `hsa mergekit CONFIG OUT [mergekit's own options]` registers
this method and then calls mergekit's own command. For every method of mergekit, it patches the definition of Whisper,
which as released fits no Whisper model, and adds small files that mergekit leaves out. The output is written
atomically.

Further secondaries are listed in their order, each with a `weight` among its parameters unless it is 1.

In your own program, call `register()` before mergekit's `run_merge`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hsa.errors import DestinationError, RequestError, SourceError, is_text
from hsa.integrations.mergekit_method import Merging
from hsa.integrations.mergekit_method import register as register_method
from hsa.integrations.mergekit_recipe import MergekitRecipe, plainly, read
from hsa.methods.hsa_extent import Extent
from hsa.methods.hsa_warnings import change_findings, percentage_findings, selection_findings, value_findings
from hsa.planning.tasks import COUNTS
from hsa.sources.checkpoint import CONFIG, read_whole
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.publish import StagedOutput
from hsa.system.signals import deferred
from hsa.system.streams import stderr_is_terminal

INSTALL = 'pip install "hsa-merge[mergekit]"'
NARROW = ("float16", "bfloat16")
SMALL_FILES = ("generation_config.json", "processor_config.json")
"""Files that mergekit leaves out: the first if the donor has no tokenizer.json, the second always."""

CARD = "README.md"

_merging: Merging | None = None


@dataclass
class MergekitResult:
    """A finished run: the output, the notes and warnings for the user, and for method `hsa` how much was merged."""

    output: Path
    extent: Extent | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def register() -> None:
    """Register `merge_method: hsa` with the mergekit of this process, and patch its definition of Whisper. Idempotent.

    Raises RequestError if mergekit is not installed, or if its interface is not supported.
    """
    _register()


def mend() -> None:
    """Patch two bugs in the mergekit of this process.

    Its definition of Whisper lacks the dot after the decoder's prefix, so no tensor is found. Its model card queries
    the Hub for every model whose path has at most one slash, even for a local directory. This happens after the whole
    merge, and fails without a network.
    """
    from mergekit import card
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    for definition in NAME_TO_ARCH.get("WhisperForConditionalGeneration", ()):
        for name, module in list(definition.modules.items()):
            prefix = module.weight_prefix
            if prefix and not prefix.endswith("."):
                definition.modules[name] = module.model_copy(update={"weight_prefix": f"{prefix}."})
    if getattr(card.is_hf, "__module__", None) == card.__name__:
        card.is_hf = partial(_is_on_the_hub, card.is_hf)


def _is_on_the_hub(original: Callable[[str], bool], path: str) -> bool:
    """Whether a card should link a model to the Hub; never for a model that exists on this machine."""
    return not os.path.exists(path) and original(path)


def run(arguments: Sequence[str]) -> MergekitResult:
    """Run mergekit's own command line: CONFIG, OUT and its options, in any order.

    Raises RequestError, DestinationError, SourceError, MismatchError, NonFiniteError, MachineError. After an error,
    there is no output.
    """
    merging = _register()
    merging.forget()
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    with plainly():
        context = command.make_context("hsa mergekit", list(arguments))
    config = Path(context.params["config_file"])
    recipe = read(config, merging)
    destination = _destination(context.params["out_path"], recipe)
    _less_noise(context)
    with deferred():  # a signal must not come between creating the directory and entering the block that removes it
        staging = StagedOutput(destination, overwrite=False, sync=True)
    with staging:
        with plainly(), context:
            context.params.update(out_path=os.fspath(staging.path))
            command.invoke(context)
        result = MergekitResult(destination, warnings=list(_cast_warnings(recipe)))
        _complete(staging, recipe, merging, context.params.get("transformers_cache"), result)
        _settle(staging)
        staging.publish()
    if recipe.is_hsa:
        findings = percentage_findings(merging.shares)
        findings += value_findings(merging.outcomes) + change_findings(merging.outcomes)
        findings += selection_findings(merging.outcomes)
        result.notes += findings.notes
        result.warnings += findings.warnings
        result.extent = Extent.of(merging.outcomes)
    return result


def _register() -> Merging:
    global _merging
    try:
        importlib.import_module("mergekit")
    except ModuleNotFoundError as error:
        if error.name != "mergekit":
            raise RequestError(f"mergekit cannot be imported: {error}; install it anew: {INSTALL}") from error
        raise RequestError(f"mergekit is not installed; {INSTALL}") from error
    with plainly():
        if _merging is None:
            merging = Merging()
            register_method(merging)
            _merging = merging
        mend()
    return _merging


def _less_noise(context: Any) -> None:
    """Turn off progress bars if stderr is not a terminal, unless the user chose."""
    chosen = getattr(context.get_parameter_source("quiet"), "name", "")
    if chosen == "DEFAULT" and not stderr_is_terminal():
        context.params["quiet"] = True


# --- before mergekit starts ---------------------------------------------------------------------------------------


def _destination(output: str, recipe: MergekitRecipe) -> Path:
    paths = [Path(place.path) for model in recipe.models for place in (model.model, model.lora) if place is not None]
    sources = [path.resolve() for path in paths if path.is_dir()]
    place = Path(output).expanduser().resolve()
    if place.is_dir() and place not in sources and any(place.iterdir()):
        raise DestinationError(f"output {place} is not empty; choose another, or move it away")
    if not is_text(place.name):
        raise DestinationError(
            f"output {place} has a name that is not UTF-8, and mergekit writes it into its card; choose another name"
        )
    return check_destination(output, sources, overwrite=False)


def _cast_warnings(recipe: MergekitRecipe) -> Iterator[str]:
    dtype = str(recipe.document.get("dtype") or "").removeprefix("torch.")
    if recipe.is_hsa and dtype in NARROW:
        every = f"all {COUNTS[len(recipe.roles)]} models"
        yield (
            f"dtype: {dtype} makes mergekit cast {every} before heads are scored, so where one is wider, "
            f"heads and values are not those of hsa merge; out_dtype: {dtype} casts the result alone"
        )


# --- after mergekit has written -----------------------------------------------------------------------------------


def _complete(
    staging: StagedOutput, recipe: MergekitRecipe, merging: Merging, cache: str | None, result: MergekitResult
) -> None:
    """Add and correct the small files that mergekit leaves out or gets wrong.

    With `hsa`, the small files come from primary, or else from base, as in `hsa merge`. With other methods, missing
    files come from the donor (base, or else the first model), or else from the next model that has them.
    """
    models = [recipe.roles["primary"], recipe.roles["base"]] if recipe.is_hsa else list(recipe.models)
    folders: list[tuple[Any, Path]] = []
    for model in models:
        with plainly():
            folders.append((model, Path(model.local_path(cache_dir=cache, ignore_lora=True))))
    tally = fsio.Tally()
    for name in SMALL_FILES:
        there = staging.file(name).is_file()
        if there and not recipe.is_hsa:
            continue
        for model, folder in folders:
            if (folder / name).is_file():
                data = read_whole("source", folder.resolve(), name, tally)
                if not there or staging.file(name).read_bytes() != data:
                    staging.file(name).unlink(missing_ok=True)
                    staging.write(name, data, tally)
                    result.notes.append(
                        f"{name} comes from {model}: mergekit {'took base' if there else 'left it out'}"
                    )
                break
    if recipe.is_hsa and not recipe.casts:
        dtype = merging.config("primary", recipe.roles["primary"]).get("dtype")
        if dtype is not None:
            _edit(staging.file(CONFIG), lambda text: _with_dtype(text, str(dtype)))
    _edit(staging.file(CARD), lambda text: text.replace(staging.path.name, staging.destination.name))


def _with_dtype(text: str, dtype: str) -> str:
    """The config.json with `dtype`, the type of the weights, which is primary's. mergekit writes base's type, to which
    loading would cast the weights."""
    document = json.loads(text)
    keys = [key for key in ("dtype", "torch_dtype") if key in document] or ["dtype"]
    if all(document.get(key) == dtype for key in keys):
        return text
    return json.dumps({**document, **dict.fromkeys(keys, dtype)}, indent=2, ensure_ascii=False) + "\n"


def _edit(path: Path, change: Callable[[str], str]) -> None:
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if change(text) != text:
            path.write_text(change(text), encoding="utf-8")


def _settle(staging: StagedOutput) -> None:
    """Set ordinary file modes, since safetensors' writer leaves 0600, and sync everything to disk before it is
    published."""
    mask = os.umask(0o022)
    os.umask(mask)
    files = [path for path in staging.path.rglob("*") if path.is_file()]
    if not files:
        raise SourceError("mergekit wrote nothing; does the configuration name models?")
    with fsio.map_write_errors(staging.path):
        for path in files:
            path.chmod(0o666 & ~mask)
            fd = os.open(path, os.O_RDONLY)
            try:
                fsio.sync(fd)
            finally:
                os.close(fd)
