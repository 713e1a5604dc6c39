"""Bad input to every registered method: one plain line that names what is wrong, exit code 2, and nothing written."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import read_tensors, snapshot, write_tensors

import hsa
from hsa.cli import app
from hsa.methods.registry import AnyMethod, method_named, methods
from hsa.methods.settings import Declared, declared
from hsa.option_names import command_line, spelled
from hsa.testing.drawn_models import WHISPER, DrawnModels, draw_models
from hsa.testing.whisper_config import write_processor

REQUIRED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.1}}
COLUMN = "column.weight"
"""The first tensor in the files that has more than one row."""

MOST = 9
"""Models that are made: more than any method takes."""

Given = dict[str, Any]


class Refusal(NamedTuple):
    """Arguments that are refused, the kind of error, and what its line says, in Python's words."""

    arguments: Given
    kind: type[hsa.HsaError]
    parts: tuple[str, ...]


class Input(NamedTuple):
    """What bad input is made of: the method, sound models, and one with tensors of other shapes."""

    method: AnyMethod
    models: DrawnModels
    unlike: Path

    @property
    def count(self) -> int:
        """Models of a sound merge: two where the method takes two."""
        return max(self.method.contract.least, min(2, self.method.contract.most))

    @property
    def settings(self) -> dict[str, Declared]:
        return {each.name: each for each in declared(self.method.Settings)}

    @property
    def weights(self) -> int:
        """How many weights a sound merge takes."""
        return self.count - (self.settings["weights"].about.entries != "model")

    def given(self, count: int | None = None, **more: Any) -> Given:
        """The arguments of a sound merge, and others in their place; None for one that is left out."""
        given = {"models": list(self.models.models[: self.count if count is None else count])}
        if self.method.contract.base != "none":
            given["base"] = self.models.base
        given = {**given, **REQUIRED.get(self.method.name, {}), **more}
        return {name: value for name, value in given.items() if value is not None}


def no_base(bad: Input) -> Refusal | None:
    if bad.method.contract.base != "required":
        return None
    needs = f"method {bad.method.name} needs base, the model that the others were trained from; give it"
    return Refusal(bad.given(base=None), hsa.RequestError, (needs,))


def a_base(bad: Input) -> Refusal | None:
    if bad.method.contract.base != "none":
        return None
    return Refusal(bad.given(base=bad.models.base), hsa.RequestError, (f"method {bad.method.name} takes no base",))


def too_few(bad: Input) -> Refusal | None:
    least = bad.method.contract.least
    if least == 1:  # none at all: the shell misses the option then
        return None
    return Refusal(bad.given(least - 1), hsa.RequestError, (f"method {bad.method.name} merges", f"got {least - 1}"))


def too_many(bad: Input) -> Refusal:
    count = bad.method.contract.most + 1
    return Refusal(bad.given(count), hsa.RequestError, (f"method {bad.method.name} merges", f"got {count}"))


def other_shapes(bad: Input) -> Refusal:
    models = [*bad.models.models[: bad.count - 1], bad.unlike]
    if bad.method.needs_heads:
        return Refusal(bad.given(models=models), hsa.MismatchError, ("_proj.weight: the shape differs", "[23, 24]"))
    return Refusal(
        bad.given(models=models, on_mismatch="error"),
        hsa.MismatchError,
        (f"tensor {COLUMN} is not the same in all sources: ", "F32 [11, 1]", "F32 [10, 1]", "on_mismatch='first'"),
    )


def given_twice(bad: Input) -> Refusal:
    """Base itself, where only one model is taken. It may be meant: a warning, which `strict` makes an error."""
    models = [bad.models.models[0]] * 2 if bad.count > 1 else [bad.models.base]
    if bad.count > 1:
        (one, two), asked = bad.method.contract.roles(2), "is the same model given twice?"
    else:
        one, two, asked = "base", "model1", "is model1 really a fine-tune, and of this base?"
    return Refusal(
        bad.given(models=models, strict=True),
        hsa.StrictError,
        (f"{one} and {two} are equal on all", asked),
    )


def weights_that_cancel(bad: Input) -> Refusal | None:
    name = next((name for name in ("normalize", "normalize_weights") if name in bad.settings), None)
    by_sum = {"linear": 0, "multislerp": 0, "hsa": 1}.get(bad.method.name)
    if by_sum is None:
        return None
    given = bad.given(2 + by_sum, weights=[1.0, -1.0])
    switch = (f"{name}=False",) if name else ()
    return Refusal(given, hsa.RequestError, ("weights", "sum to 0", "a mean divides by their sum", *switch))


def a_weight_that_is_not_finite(bad: Input) -> Refusal | None:
    if "weights" not in bad.settings:
        return None
    values = [1.0] * (bad.weights - 1) + [math.nan]
    entries = bad.settings["weights"].about.entries
    what = f"weights of {entries} {bad.weights} must be in [-100, 100], got nan"
    return Refusal(bad.given(weights=values), hsa.RequestError, (what,))


def other_weights_than_models(bad: Input) -> Refusal | None:
    if "weights" not in bad.settings or bad.method.name == "hsa_script":
        return None
    entries = "models" if bad.weights == bad.count else "secondaries"
    what = f"weights must have as many values as there are {entries}, {bad.weights}, got {bad.weights + 1}"
    return Refusal(bad.given(weights=[1.0] * (bad.weights + 1)), hsa.RequestError, (what,))


def weights_of_a_method_without(bad: Input) -> Refusal | None:
    if "weights" in bad.settings:
        return None
    what = f"method {bad.method.name} has no weights; its settings are "
    return Refusal(bad.given(weights=[1.0] * bad.count), hsa.RequestError, (what,))


def a_setting_of_another_method(bad: Input) -> Refusal:
    name = "select_topk" if bad.method.name != "sce" else "density"
    what = f"method {bad.method.name} has no {name}; its settings are "
    return Refusal(bad.given(**{name: 0.5}), hsa.RequestError, (what,))


INPUTS: tuple[Callable[[Input], Refusal | None], ...] = (
    no_base,
    a_base,
    too_few,
    too_many,
    other_shapes,
    given_twice,
    weights_that_cancel,
    a_weight_that_is_not_finite,
    other_weights_than_models,
    weights_of_a_method_without,
    a_setting_of_another_method,
)


def out_of_range(bad: Input) -> Iterator[Refusal]:
    """Every number of the method beyond each of its ends, infinite, not a number, and a text."""
    for name, each in bad.settings.items():
        about = each.about
        if about.low is None and about.high is None:
            continue
        beyond = [math.nan, math.inf, *(end for end in (about.low, about.high) if end is not None and abs(end) < 1e9)]
        for end in beyond:
            value = end if not math.isfinite(end) else end - 1 if end == about.low else end + 1
            if not (about.whole and not math.isfinite(value)):
                yield Refusal(bad.given(**{name: value}), hsa.RequestError, (f"{name} must be ", f"got {value}"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, tuple[DrawnModels, Path]]:
    """By whether they have heads: float32 models in one layout, and one with a row less in each tensor."""
    found = {}
    for heads in (False, True):
        folder = tmp_path_factory.mktemp("whisper" if heads else "generic")
        models = draw_models(folder, MOST, random.Random(0), family="whisper" if heads else "generic", one_dtype=True)
        for path in (models.base, *models.models):
            write_tensors(path, {name: tensor.float() for name, tensor in read_tensors(path).items()})
            if heads:
                write_processor(path, WHISPER)
        unlike = Path(shutil.copytree(models.models[0], folder / "unlike"))
        write_tensors(unlike, {name: _one_row_less(tensor) for name, tensor in read_tensors(unlike).items()})
        found[heads] = models, unlike
    return found


def _one_row_less(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].contiguous() if tensor.ndim and len(tensor) > 1 else tensor


@pytest.fixture
def bad(request: pytest.FixtureRequest, families: Mapping[bool, tuple[DrawnModels, Path]]) -> Input:
    method = method_named(request.param)
    return Input(method, *families[method.needs_heads])


@pytest.fixture
def refused(bad: Input, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[Refusal], None]:
    """Checks that Python and the shell refuse a merge with one line, and that nothing is written."""

    def check(refusal: Refusal) -> None:
        before = snapshot(bad.models.base.parent)
        output = tmp_path / "results" / "out"
        with pytest.raises(hsa.HsaError) as caught:
            hsa.merge(method=bad.method.name, **refusal.arguments, output=output)
        message = str(caught.value)
        assert type(caught.value) is refusal.kind and message.isprintable(), message
        assert all(part in message for part in refusal.parts), message
        capfd.readouterr()
        status = app.run(command(bad, refusal.arguments, output))
        out, err = capfd.readouterr()
        assert (status, out, err.count("\n")) == (caught.value.exit_code, "", 1), err
        assert status == 2 and err.startswith("hsa: error: ")
        if refusal.kind is not hsa.RequestError:  # whose words are Python's or the shell's
            assert refusal.parts[0] in err
        assert list(tmp_path.iterdir()) == [] and snapshot(bad.models.base.parent) == before

    return check


def command(bad: Input, arguments: Given, output: Path) -> list[str]:
    """The same as a command line."""
    words = ["merge", f"--method={bad.method.name}", f"--output={output}", "--quiet"]
    with spelled(command_line):
        for name, value in arguments.items():
            option = {"models": "--model", "weights": "--weight"}.get(name, command_line(name))
            for entry in value if isinstance(value, list) else [value]:
                words.append(option if entry is True else f"{option}={entry}")
    return words


@pytest.mark.parametrize("bad", methods(), indirect=True)
@pytest.mark.parametrize("of", INPUTS, ids=lambda of: of.__name__)
def test_what_cannot_be_merged_is_refused(
    bad: Input, of: Callable[[Input], Refusal | None], refused: Callable[[Refusal], None]
) -> None:
    refusal = of(bad)
    if refusal is not None:
        refused(refusal)


@pytest.mark.parametrize("bad", methods(), indirect=True)
def test_numbers_out_of_range_are_refused(bad: Input, tmp_path: Path) -> None:
    for refusal in out_of_range(bad):
        with pytest.raises(refusal.kind) as caught:
            hsa.merge(method=bad.method.name, **refusal.arguments, output=tmp_path / "out")
        message = str(caught.value)
        assert all(part in message for part in refusal.parts) and message.isprintable(), message
    assert list(tmp_path.iterdir()) == []
