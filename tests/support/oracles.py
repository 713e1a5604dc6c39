"""The formula of every method of hsa in plain torch, as the tests of all methods call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import full_load
import torch
from merge_oracle import is_target
from torch import Tensor

from hsa import reference
from hsa.reference import linear_combinations, masks_and_votes, subspaces
from hsa.testing.conformance import Expectation, Oracle
from hsa.testing.drawn_models import WHISPER

RESCALE = {"none": False, "l1": True, "density": "density"}


def whole_model(merge: Callable[..., Tensor], *, named: bool = False) -> Oracle:
    """The oracle of a method that merges whole models, where running statistics are averaged by the weights."""

    def oracle(name: str, base: Tensor | None, models: Sequence[Tensor], **settings: Any) -> Tensor:
        if name.endswith(("running_mean", "running_var")):
            return average(models, settings.get("weights", [1.0] * len(models)))
        settings.pop("orthogonalize", None)  # two ways to one matrix
        if "rescale" in settings:
            settings["rescale"] = RESCALE[settings["rescale"]]
        return merge(base, models, **({"name": name} if named else {}), **settings)

    return oracle


def della(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DELLA, which refuses densities and epsilons that give no probabilities."""

    def oracle(base: Tensor, models: Sequence[Tensor], **settings: Any) -> Tensor:
        count = len(models)
        densities, spreads = settings.get("density", [1.0] * count), settings.get("epsilon", [0.15] * count)
        for density, spread in zip(densities, spreads, strict=True):
            if 0 < density < 1 and not 0 < density - spread <= density + spread < 1:
                raise ValueError(f"density {density} and epsilon {spread}")
        return merge(base, models, **settings)

    return oracle


def average(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean by the weights above zero; of all alike where there is none."""
    positive = [max(weight, 0.0) for weight in weights]
    whole = math.fsum(positive)
    shares = [weight / whole for weight in positive] if whole > 0 else [1 / len(models)] * len(models)
    terms = [
        model * torch.tensor(share, dtype=torch.float64).float() for model, share in zip(models, shares, strict=True)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def place_of(name: str) -> tuple[int, int, int, int]:
    """Of an attention projection: its layer, the layers and the heads of its stack, the axis along which heads lie."""
    stack, _, layer, *_ = name.split(".")
    heads, layers = getattr(WHISPER, f"{stack}_heads"), getattr(WHISPER, f"{stack}_layers")
    return int(layer), layers, heads, 1 if "out_proj" in name else 0


def hsa_formula(name: str, base: Tensor | None, models: Sequence[Tensor], **settings: Any) -> Tensor | None:
    assert base is not None
    attention, other = (settings.pop(f"{part}_scale", 1.0) for part in ("attention", "non_attention"))
    settings = {key: value for key, value in settings.items() if key not in ("numerics", "load_dtype")}
    chosen, heads, layers = (settings.pop(key, None) for key in ("targets", "num_heads", "num_layers"))
    if not is_target(name, chosen or "encoder-qkv"):
        return None if other == 1.0 else reference.merge_other(base, models[0], scale=other)
    layer, own_layers, own_heads, axis = place_of(name)
    defaults = {"k": 0.6, "lam": 0.5, "alpha": 0.2}
    return reference.merge_tensor(
        base,
        models[0],
        list(models[1:]),
        **(defaults | settings),
        layer=layer,
        layers=layers or own_layers,
        heads=heads or own_heads,
        head_axis=axis,
        attention_scale=attention,
    ).value


def script_formula(name: str, base: Tensor | None, models: Sequence[Tensor], **settings: Any) -> Tensor:
    """One tensor by the script's own operations."""
    assert base is not None
    config = SimpleNamespace(
        encoder_attention_heads=WHISPER.encoder_heads,
        decoder_attention_heads=WHISPER.decoder_heads,
        encoder_layers=WHISPER.encoder_layers,
        decoder_layers=WHISPER.decoder_layers,
    )
    held = [
        SimpleNamespace(config=config, named_parameters=lambda tensor=tensor: [(f"model.{name}", tensor)])
        for tensor in (base, *models)
    ]
    own = {key: value for key, value in settings.items() if key not in ("numerics", "load_dtype", "weights")}
    merged: dict[str, Tensor] = full_load.merge_models(*held, **own)
    return merged[f"model.{name}"]


def _of(
    module: Any, *methods: str, named: bool = False, numbered: bool = False, **choices: Sequence[Any]
) -> dict[str, Expectation]:
    return {
        name: Expectation(whole_model(getattr(module, name), named=named), choices or None, numbered=numbered)
        for name in methods
    }


HEADS: dict[str, Sequence[Any]] = {
    "num_heads": (None, None, 4, 1),
    "num_layers": (None, 5),
    "non_attention_scale": (1.0, 0.7),
    "attention_scale": (1.0, -0.5, 1.3),
}
EXPECTATIONS: dict[str, Expectation] = {
    **_of(linear_combinations, "linear", "task_arithmetic", "slerp", "nuslerp", "model_stock"),
    **_of(linear_combinations, "multislerp", eps=(1e-8, 0.0, 1e-3)),
    **_of(linear_combinations, "karcher", max_iter=(10, 0, 1, 25), tol=(1e-5, 0.0, 0.1)),
    **_of(masks_and_votes, "ties", "breadcrumbs", "breadcrumbs_ties", "sce"),
    **_of(masks_and_votes, "dare_linear", "dare_ties", named=True, numbered=True),
    **{
        name: Expectation(whole_model(della(merge), named=True), {"epsilon": (0.0, 0.05, 0.15, 0.3)}, numbered=True)
        for name, merge in (("della", masks_and_votes.della), ("della_linear", masks_and_votes.della_linear))
    },
    **_of(masks_and_votes, "ram", epsilon=(1e-5, 0.0, 0.01)),
    **_of(masks_and_votes, "nearswap", t=(0.0, 1e-6, 0.003, 100.0)),
    **_of(subspaces, "tsv_m", "tsv_m_boosted", "iso_c", "iso_cts", named=True),
    "hsa": Expectation(hsa_formula, {**HEADS, "numerics": ("exact",), "load_dtype": ("auto",)}, "whisper"),
    "hsa_script": Expectation(
        script_formula, {**HEADS, "load_dtype": ("auto",), "weights": (1.0,)}, "whisper", one_dtype=True
    ),
}
"""By method; the test of all methods fails for one that is registered and is not here."""
