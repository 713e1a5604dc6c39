"""Holds a merge method to its formula in plain torch: drawn models, settings, slices, threads and shards.

For the methods of hsa a test of every one of them does this; the author of a method in a file of his own calls
`check_method` (docs/add-a-method.md).
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa.actions.merge import merge
from hsa.architectures.base import TensorInfo
from hsa.backends import array_block, cpu
from hsa.engine import streamed
from hsa.errors import HsaError, HsaWarning, RequestError
from hsa.methods.base import Treatment
from hsa.methods.model_method import ModelSettings
from hsa.methods.registry import AnyMethod, method_named
from hsa.methods.settings import declared
from hsa.planning import file_layout
from hsa.testing.drawn_models import DrawnModels, Family, draw_models
from hsa.testing.drawn_settings import Drawn, depth_of, draw_settings, resolved
from hsa.verification.verify import verify

if TYPE_CHECKING:
    from torch import Tensor

Oracle = Callable[..., "Tensor | None"]
"""The formula: `oracle(name, base, models, **settings)` gives the merged tensor, float32, or None where the first
model's stays. `name` has no leading `model.`; `base` is None for a merge without one; tensors are float32. A setting
that was drawn is a number for this tensor, or a list with one for each model; others have their defaults. Raises
ValueError for what cannot be merged."""

MOST = 5
"""Models of the largest merge that is drawn."""

MOST_REFUSED = 30
"""Drawn merges that the oracle refuses too before another is not tried."""

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


@dataclass(frozen=True)
class Expectation:
    """What a method is held to.

    Args:
        oracle: its formula, see `Oracle`.
        choices: values that settings are drawn from, where their declared range does not do.
        family: the models to merge: `whisper` for methods that merge attention projections.
        one_dtype: all sources have one element type, and the oracle gets the tensors in it.
        numbered: the oracle takes `numbers` too, the places from 0 of the models that a tensor is merged of, on which
            their random masks hang.
    """

    oracle: Oracle
    choices: Mapping[str, Sequence[Any]] | None = None
    family: Family = "generic"
    one_dtype: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class Trial:
    """One drawn merge: its models, whether base is given, settings, the output's element type, and where it lies."""

    method: AnyMethod
    models: DrawnModels
    based: bool
    settings: Drawn
    dtype: str
    output: Path

    @property
    def sources(self) -> dict[str, Any]:
        """The sources as `hsa.merge` and `hsa.verify` take them."""
        return {"models": list(self.models.models), **({"base": self.models.base} if self.based else {})}

    def __str__(self) -> str:
        base = "base and " if self.based else ""
        dtypes = [str(next(iter(held.values())).dtype) for held in self.models.tensors.values()]
        return f"{self.method.name} of {base}{len(self.models.models)} models ({dtypes}), {self.settings}, {self.dtype}"


def counts(method: AnyMethod) -> range:
    """The numbers of models that its contract allows, up to 5."""
    return range(method.contract.least, min(method.contract.most, MOST) + 1)


def check_method(method: str, oracle: Oracle, folder: str | Path, *, trials: int = 2, **about: Any) -> None:
    """Merge drawn models by a method for every number of models that it takes up to 5, and compare with the formula.

    Args:
        method: its name.
        oracle: the formula, see `Oracle`.
        folder: an empty directory to write models and merges into.
        trials: merges for each number of models.
        about: further fields of `Expectation`.

    Raises AssertionError, which names settings and tensor, where a merge differs from the formula or `hsa.verify` finds
    a problem.

    Example:
        >>> check_method("maximum", lambda name, base, models, factor=1.0: ..., "folder")  # doctest: +SKIP
    """
    expectation = Expectation(oracle, **about)
    for count in counts(method_named(method)):
        check_count(method, count, expectation, Path(folder) / str(count), trials=trials)


def check_count(method: str, count: int, expectation: Expectation, folder: Path, *, trials: int = 2) -> list[Trial]:
    """The same for one number of models. What is drawn depends on method and number alone."""
    own, draw = method_named(method), random.Random(f"{method} {count}")
    family, one_dtype = expectation.family, expectation.one_dtype
    done: list[Trial] = []
    for number in range(trials + MOST_REFUSED):
        mismatched = family == "generic" and issubclass(own.Settings, ModelSettings) and draw.random() < 0.4
        models = draw_models(
            folder / f"models{number}", count, draw, family=family, one_dtype=one_dtype, mismatched=mismatched
        )
        based = own.contract.base == "required" or (own.contract.base == "optional" and draw.random() < 0.5)
        whole = Trial(own, models, based, _on_mismatch(draw) if mismatched else {}, "auto", folder)
        settings = whole.settings | draw_settings(own, count, draw, expectation.choices, merged_names(whole))
        dtype = "auto" if one_dtype else draw.choice(("auto", "auto", "float32", "float16", "bfloat16"))
        trial = Trial(own, models, based, settings, dtype, folder / f"merged{number}")
        if _check(trial, expectation, draw):
            done.append(trial)
        if len(done) == trials:
            return done
    raise AssertionError(f"method {method}: of {MOST_REFUSED + trials} drawn merges only {len(done)} could be merged")


def _on_mismatch(draw: random.Random) -> Drawn:
    return {"on_mismatch": draw.choice(("first", "skip-model", "skip-model", "error"))}


def merged_names(trial: Trial) -> list[str]:
    """The canonical names of the tensors that a method of whole models computes; none where there are mismatches that
    it refuses."""
    if not issubclass(trial.method.Settings, ModelSettings) or trial.settings.get("on_mismatch") == "error":
        return []
    held = trial.models.tensors[trial.models.models[0]]
    present = [stored for stored, tensor in held.items() if tensor.numel() and fitting(trial, stored) is not None]
    merged = [stored for stored in present if _treatment(trial, stored, held[stored]).kind == "merge"]
    return [stored.removeprefix("model.") for stored in merged]


def fitting(trial: Trial, stored: str) -> list[int] | None:
    """The places from 0 of the models that a tensor of the first one is merged of: all, or where tensors do not fit it,
    what `on_mismatch` says; None where the first model's stays. ValueError where it says to refuse."""
    every, paths = trial.models.tensors, trial.models.models
    shape = every[paths[0]][stored].shape

    def fits(path: Path) -> bool:
        return stored in every[path] and every[path][stored].shape == shape

    numbers = [number for number, path in enumerate(paths) if fits(path)]
    has_base = not trial.based or fits(trial.models.base)
    if has_base and len(numbers) == len(paths):
        return numbers
    mode = trial.settings.get("on_mismatch", "first")
    if mode == "error":
        raise ValueError(f"tensor {stored} is not the same in all sources")
    enough = len(numbers) >= max(2, trial.method.contract.least)
    return numbers if mode == "skip-model" and has_base and enough and 0 not in shape else None


def _check(trial: Trial, expectation: Expectation, draw: random.Random) -> bool:
    """Whether the merge could be made; then it is what the oracle gives, and verify accepts it."""
    output = draw.choice(("5GB", "3KB", "20KB"))
    try:
        wanted = expected(trial, expectation)
    except ValueError as error:
        wanted = None
        why = str(error)
    with sliced(draw):
        try:
            merge(
                method=trial.method.name,
                **trial.sources,
                **trial.settings,
                dtype=trial.dtype,
                output=trial.output,
                threads=draw.randint(1, 5),
                max_shard_size=output,
                sync=False,
            )
        except HsaError as error:
            assert wanted is None or not _finite(wanted), f"{trial}: refused, and the formula merges it: {error}"
            assert not trial.output.exists(), trial
            return False
        assert wanted is not None, f"{trial}: merged, and the formula refuses it: {why}"
        same(trial, stored(trial.output), wanted)
        verified(trial, draw.randint(1, 5))
        found = merged_in_memory(trial, draw.randint(1, 5))
        same(trial, found, {name: tensor for name, tensor in wanted.items() if name in found})
    return True


def expected(trial: Trial, expectation: Expectation) -> dict[str, Tensor]:
    """What the oracle makes of every tensor, in the element type of the output. ValueError where it refuses one."""
    import torch

    every, paths = trial.models.tensors, trial.models.models
    names = [stored.removeprefix("model.") for stored in every[paths[0]]]
    result = {}
    for (stored, first), name in zip(every[paths[0]].items(), names, strict=True):
        numbers = fitting(trial, stored)
        tensors = [every[paths[number]][stored] for number in numbers or ()]
        base = every[trial.models.base][stored] if trial.based and numbers else None
        final = first.dtype if trial.dtype == "auto" else getattr(torch, trial.dtype)
        merged = None
        if tensors and first.is_floating_point() and first.numel() and not _copied(trial, base, tensors):
            own = resolved(trial.method, trial.settings, name, len(paths), depth=depth_of(name, names), numbers=numbers)
            if expectation.numbered:
                own["numbers"] = numbers
            if expectation.one_dtype:
                merged = expectation.oracle(name, base, tensors, **own)
            else:
                wide = None if base is None else base.float()
                merged = expectation.oracle(name, wide, [tensor.float() for tensor in tensors], **own)
        value = first if merged is None else merged
        result[stored] = value.to(final) if first.is_floating_point() else first
    return result


def _copied(trial: Trial, base: Tensor | None, tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor has the same bytes in all sources, and the method copies such tensors."""
    others = [*tensors[1:], *([] if base is None else [base])]
    same_bytes = all(raw_bytes(other) == raw_bytes(tensors[0]) and other.dtype == tensors[0].dtype for other in others)
    try:
        return same_bytes and trial.method.copies_equal(trial.method.Settings(**trial.settings))
    except HsaError:  # settings that no merge takes: the formula must refuse them too
        return False


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def stored(output: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    from safetensors.torch import load_file

    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_in_memory(trial: Trial, threads: int) -> dict[str, Tensor]:
    """The same merge by `hsa.Merger`, which gives the tensors that a method merges; none where it says to use
    `hsa.merge`."""
    from hsa.actions.merger.merger import Merger

    of_all = {
        each.name for each in declared(trial.method.Settings) if each.about.structural or not each.about.patchable
    }
    fixed = {name: value for name, value in trial.settings.items() if name in of_all}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HsaWarning)
            merger = Merger(method=trial.method.name, **trial.sources, **fixed, dtype=trial.dtype, threads=threads)
    except RequestError as error:
        assert "use hsa.merge" in str(error), f"{trial}: {error}"
        return {}
    found = merger.merge(**{name: value for name, value in trial.settings.items() if name not in of_all})
    recorded = json.loads((trial.output / "hsa_merge.json").read_text(encoding="utf-8"))["targets"]
    assert found.keys() == recorded.keys(), f"{trial}: {sorted(found.keys() ^ recorded.keys())} are merged once"
    return found


def same(trial: Trial, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """AssertionError unless these are the tensors: their bytes, or what lies within the method's tolerance."""
    assert found.keys() == wanted.keys(), f"{trial}: {sorted(found.keys() ^ wanted.keys())} differ"
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), f"{trial}: {name}"
        if _is_approximate(trial, name, tensor):
            apart = float((found[name].double() - tensor.double()).norm())
            most = trial.method.tolerance * float(tensor.double().norm())
            assert apart <= most, f"{trial}: {name} is {apart} away, and at most {most} is allowed"
        elif raw_bytes(found[name]) != raw_bytes(tensor):
            pairs = zip(found[name].reshape(-1).tolist(), tensor.reshape(-1).tolist(), strict=True)
            differing = [(at, *pair) for at, pair in enumerate(pairs) if pair[0] != pair[1]][:3]
            raise AssertionError(f"{trial}: {name} differs in (element, merged, formula): {differing or 'zeros'}")


def _is_approximate(trial: Trial, name: str, tensor: Tensor) -> bool:
    """Whether another machine may round the tensor otherwise."""
    return trial.method.tolerance > 0.0 and _treatment(trial, name, tensor).layout == "whole"


def _treatment(trial: Trial, name: str, tensor: Tensor) -> Treatment:
    """What the method does with a tensor."""
    code = CODES[str(tensor.dtype).removeprefix("torch.")]
    info = TensorInfo(name.removeprefix("model."), code, tuple(tensor.shape))
    return trial.method.treatment(info, None, trial.method.Settings(**trial.settings))


def verified(trial: Trial, threads: int) -> None:
    """AssertionError unless `hsa.verify` makes the output again from its sources."""
    report = verify(trial.output, **trial.sources, threads=threads)
    assert report.ok, f"{trial}: {[problem.what for problem in report.problems]}"
    assert report.bytes_follow and report.decisions_follow is not False, f"{trial}: {report}"
    record = json.loads((trial.output / "hsa_merge.json").read_text(encoding="utf-8"))
    assert record["method"]["name"] == trial.method.name


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor: signed zeros count."""
    import torch

    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


@contextmanager
def sliced(draw: random.Random) -> Iterator[None]:
    """Cut tensors into slices and blocks of drawn sizes, held or read again between passes, while the block lasts."""
    slices = draw.choice((1024, 2048, 3072, 1 << 18))
    drawn = (
        (file_layout, "SLICE_ELEMENTS", slices),
        (file_layout, "MAX_WHOLE", draw.choice((0, 0, 2000, 24 << 20))),
        (streamed, "KEPT_BYTES", draw.choice((0, 20_000, 128 << 20))),
    )
    tile = draw.choice((1024, 2100, 1 << 17))
    changes = [*drawn, (array_block, "TILE", tile), (cpu, "TILE", tile)]
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
