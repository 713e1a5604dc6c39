"""Compare a merge method with its formula in plain torch, for random models, settings, slices, threads and shards.

The tests of hsa do this for each of its own methods. Authors of other methods call `check_method`
(docs/contributing/add-a-method.md).
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
"""The formula: `oracle(name, base, models, **settings)` returns the merged float32 tensor, or None if the first model's
tensor is kept. `name` has no leading `model.`; `base` is None for a merge without a base; tensors are float32. A drawn
setting is a number for this tensor, or a list with one number for each model; other settings have their defaults.
Raises ValueError if the merge must be refused."""

MOST = 5
"""The number of models of the largest merge that is drawn."""

MOST_REFUSED = 30
"""The most drawn merges that may be refused, by the merge and by the oracle, before a check gives up."""

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


@dataclass(frozen=True)
class Expectation:
    """The expected behaviour of a method.

    Args:
        oracle: the method's formula, see `Oracle`.
        choices: values to draw settings from, if their declared range is not suitable.
        family: the family of the models to merge: `whisper` for methods that merge attention projections.
        one_dtype: all sources have the same element type, and the oracle receives the tensors in it.
        numbered: the oracle also takes `numbers`, the indices from 0 of the models that a tensor is merged from. Random
            masks depend on them.
    """

    oracle: Oracle
    choices: Mapping[str, Sequence[Any]] | None = None
    family: Family = "generic"
    one_dtype: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class Trial:
    """One drawn merge: its models, whether base is given, settings, the output's element type, and the output."""

    method: AnyMethod
    models: DrawnModels
    based: bool
    settings: Drawn
    dtype: str
    output: Path

    @property
    def sources(self) -> dict[str, Any]:
        """The sources as arguments of `hsa.merge` and `hsa.verify`."""
        return {"models": list(self.models.models), **({"base": self.models.base} if self.based else {})}

    def __str__(self) -> str:
        base = "base and " if self.based else ""
        dtypes = [str(next(iter(held.values())).dtype) for held in self.models.tensors.values()]
        return f"{self.method.name} of {base}{len(self.models.models)} models ({dtypes}), {self.settings}, {self.dtype}"


def counts(method: AnyMethod) -> range:
    """The numbers of models that the method's contract allows, up to 5."""
    return range(method.contract.least, min(method.contract.most, MOST) + 1)


def check_method(method: str, oracle: Oracle, folder: str | Path, *, trials: int = 2, **about: Any) -> None:
    """Merge drawn models with a method, for every number of models that it accepts up to 5, and compare the results
    with its formula.

    Args:
        method: the name of the method.
        oracle: the formula, see `Oracle`.
        folder: an empty directory to write models and merges into.
        trials: the number of merges for each number of models.
        about: further fields of `Expectation`.

    Raises AssertionError, which names settings and tensor, if a merge differs from the formula or `hsa.verify` finds a
    problem.

    Example:
        >>> check_method("maximum", lambda name, base, models, factor=1.0: ..., "folder")  # doctest: +SKIP
    """
    expectation = Expectation(oracle, **about)
    for count in counts(method_named(method)):
        check_count(method, count, expectation, Path(folder) / str(count), trials=trials)


def check_count(method: str, count: int, expectation: Expectation, folder: Path, *, trials: int = 2) -> list[Trial]:
    """The same as `check_method`, for one number of models. The draws depend only on the method and this number."""
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
    """The canonical names of the tensors that a method of whole models computes; none if it refuses mismatches."""
    if not issubclass(trial.method.Settings, ModelSettings) or trial.settings.get("on_mismatch") == "error":
        return []
    held = trial.models.tensors[trial.models.models[0]]
    present = [stored for stored, tensor in held.items() if tensor.numel() and fitting(trial, stored) is not None]
    merged = [stored for stored in present if _treatment(trial, stored, held[stored]).kind == "merge"]
    return [stored.removeprefix("model.") for stored in merged]


def fitting(trial: Trial, stored: str) -> list[int] | None:
    """The indices from 0 of the models that a tensor of the first model is merged from; None if it is kept.

    These are all models if their tensors match. Otherwise they depend on `on_mismatch`; raises ValueError if it is
    `error`.
    """
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
    """Whether the merge was made. Asserts that it equals the oracle's result and that verify accepts it, or that the
    oracle refuses it too."""
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
    """The oracle's result for every tensor, in the element type of the output. Raises ValueError if it refuses one."""
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
    """Whether a tensor has the same bytes in all sources and the method copies such tensors."""
    others = [*tensors[1:], *([] if base is None else [base])]
    same_bytes = all(raw_bytes(other) == raw_bytes(tensors[0]) and other.dtype == tensors[0].dtype for other in others)
    try:
        return same_bytes and trial.method.copies_equal(trial.method.Settings(**trial.settings))
    except HsaError:  # invalid settings, which the formula must refuse too
        return False


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def stored(output: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_in_memory(trial: Trial, threads: int) -> dict[str, Tensor]:
    """The tensors of the same merge made with `hsa.Merger`, which returns only merged tensors; empty if it requires
    `hsa.merge` for these settings."""
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
    """Assert that these are the wanted tensors: with equal bytes, or within the method's tolerance."""
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
    """Whether another machine may round the tensor differently."""
    return trial.method.tolerance > 0.0 and _treatment(trial, name, tensor).layout == "whole"


def _treatment(trial: Trial, name: str, tensor: Tensor) -> Treatment:
    """The method's treatment of a tensor."""
    code = CODES[str(tensor.dtype).removeprefix("torch.")]
    info = TensorInfo(name.removeprefix("model."), code, tuple(tensor.shape))
    return trial.method.treatment(info, None, trial.method.Settings(**trial.settings))


def verified(trial: Trial, threads: int) -> None:
    """Assert that `hsa.verify` reproduces the output from its sources."""
    report = verify(trial.output, **trial.sources, threads=threads)
    assert report.ok, f"{trial}: {[problem.what for problem in report.problems]}"
    assert report.bytes_follow and report.decisions_follow is not False, f"{trial}: {report}"
    record = json.loads((trial.output / "hsa_merge.json").read_text(encoding="utf-8"))
    assert record["method"]["name"] == trial.method.name


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, in which signed zeros differ."""
    import torch

    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


@contextmanager
def sliced(draw: random.Random) -> Iterator[None]:
    """Context in which tensors are cut into slices and blocks of drawn sizes, and are cached or read again between
    passes."""
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
