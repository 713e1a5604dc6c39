"""The HSA merge in plain torch: the specification in code.

Source: Shankar, Wang, Eren, Alwan, "Compositional domain adaptation for automatic speech recognition with
headwise selective attention merging", Computer Speech & Language, 2026, 102012. Several secondaries are an extension of
this package.

With base ``B``, primary ``M1``, secondary ``M2`` and the task vectors ``tv1 = M1 - B``, ``tv2 = M2 - B``,
each target tensor is merged independently:

1. ``proxy = |tv1| + |tv2|``, elementwise.
2. ``score[h]`` is the L2 norm of ``proxy`` over the elements of head ``h``.
3. A head is selected when its score is not below the ``keep``-th largest, ``keep = max(1, round(k * H))``.
4. ``lambda_i = lambda ** (alpha * ((i + 1) / L))`` for layer ``i`` of ``L``.
5. Selected heads become ``B + scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)``, the others
   ``B + scale * tv1``.

With several secondaries ``M2 ... MN`` and their weights ``w``, ``proxy = |tv1| + |tv2| + ... + |tvN|``, and
``(1 - lambda_i) * tv2`` becomes the sum of ``(1 - lambda_i) * w_j / (w_2 + ... + w_N) * tv_j``.

Every function evaluates this either in float32, which gives the bytes that ``--numerics exact`` promises, or in
float64, which gives the value that float32 results are measured against. The code is deliberately slow and simple: it
uses no blocks and no buffers, and shares nothing with the backends that it checks. Arguments are trusted: ranges and
finiteness are checked in the package's public functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """One merged target tensor.

    Attributes:
        value: the merged tensor, in the shape of its sources.
        selected: indices of the blended heads, ascending.
        squared_scores: float64 [H], the squared saliency score of each head.
    """

    value: Tensor
    selected: tuple[int, ...]
    squared_scores: Tensor


def keep_count(k: float, heads: int) -> int:
    """Number of heads to keep of ``heads``: ``max(1, round_half_even(k * heads))``, and 0 for ``k = 0``.

    ``k`` is a share in [0, 1], or a percentage in (1, 100]. Ties at the cutoff can select more heads than this.
    """
    if k == 0:
        return 0
    share = k / 100 if k > 1 else k
    return max(1, round(share * heads))


def layer_coefficient(lam: float, alpha: float, layer: int, layers: int) -> float:
    """``lambda_i = lam ** (alpha * ((layer + 1) / layers))`` in float64, with ``0 ** 0 = 1``.

    ``layer`` is the zero-based index within a stack of ``layers``, ``lam`` lies in [0, 1], ``alpha >= 0``.
    """
    return math.pow(lam, alpha * ((layer + 1) / layers))


def head_scores(
    base: Tensor,
    primary: Tensor,
    secondary: Tensor | list[Tensor],
    *,
    heads: int,
    head_axis: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Squared saliency scores: ``score[h] ** 2 = sum of (|M1 - B| + |M2 - B| + ...) ** 2`` over head ``h``.

    Args:
        base, primary, secondary: floating tensors of the same shape; dtypes may differ. ``[rows, columns]`` for a
            weight, ``[rows]`` for a bias. ``secondary`` may be a list of several.
        heads: H, which must divide the size of ``head_axis``.
        head_axis: 0 where a head is a run of rows (q, k, v and their biases), 1 where it is a run of columns
            (the weight of ``out_proj``).
        dtype: precision of the proxy, float32 or float64. Its squares are summed in float64 either way.

    Returns:
        float64 [H].

    Raises:
        RuntimeError: ``heads`` does not divide the axis.
    """
    wide_base = base.to(dtype)
    proxy = (primary.to(dtype) - wide_base).abs()
    for model in _listed(secondary):
        proxy = proxy + (model.to(dtype) - wide_base).abs()
    rows = proxy.movedim(head_axis, 0)
    by_head = rows.reshape(heads, len(rows) // heads, *rows.shape[1:])
    squares = by_head.double() * by_head.double()
    return squares.flatten(1).sum(dim=1)


def select_heads(squared: Tensor, k: float) -> Tensor:
    """Bool [H]: which heads are blended, given squared scores ``[H]`` and the share ``k`` of `keep_count`.

    A head is selected when its score is not below the ``keep``-th largest, so all ties at the cutoff are selected.
    """
    keep = keep_count(k, squared.numel())
    if keep == 0:
        return torch.zeros_like(squared, dtype=torch.bool)
    threshold = squared.sort(descending=True).values[keep - 1]
    return squared >= threshold


def margin(squared: Tensor, k: float) -> float | None:
    """How clear the selection is: ``(kept - dropped) / kept``, in (0, 1].

    ``kept`` is the lowest squared score among the selected heads, ``dropped`` the highest among the others.
    None if all heads are selected or none is, because then there is no cutoff.
    """
    selected = select_heads(squared, k)
    if selected.all() or not selected.any():
        return None
    kept = squared[selected].min().item()
    dropped = squared[~selected].max().item()
    return float((kept - dropped) / kept)


def merge_tensor(
    base: Tensor,
    primary: Tensor,
    secondary: Tensor | list[Tensor],
    *,
    k: float,
    lam: float,
    alpha: float,
    layer: int,
    layers: int,
    heads: int,
    head_axis: int = 0,
    attention_scale: float = 1.0,
    weights: list[float] | None = None,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> MergedTensor:
    """Merge one target tensor.

    Selected heads become ``B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)``. With several secondaries,
    the mean of their task vectors, weighted by ``weights``, replaces ``tv2``. Other heads become
    ``B + attention_scale * tv1``, which at scale 1 is primary itself, unchanged.

    Args:
        base, primary, secondary, heads, head_axis: as for `head_scores`.
        k: as for `keep_count`.
        lam, alpha, layer, layers: as for `layer_coefficient`; layer and stack are those of this tensor.
        attention_scale: any finite number.
        weights: one for each secondary, 1 each by default; their sum must not be 0.
        out_dtype: dtype of the result, by default primary's.
        dtype: float32 evaluates in float32, rounding after each operation, with coefficients computed in float64, and
            rounds once (nearest even) to ``out_dtype``. float64 evaluates everything in float64, including the
            selection, and returns float64; ``out_dtype`` has no effect.
    """
    squared = head_scores(base, primary, secondary, heads=heads, head_axis=head_axis, dtype=dtype)
    selected = select_heads(squared, k)
    lambda_i = layer_coefficient(lam, alpha, layer, layers)
    secondaries = _listed(secondary)
    given = [1.0] * len(secondaries) if weights is None else list(weights)
    coefficients = [(1.0 - lambda_i) * (weight / math.fsum(given)) for weight in given]

    wide_base = base.to(dtype)
    displacement = torch.tensor(lambda_i, dtype=dtype) * (primary.to(dtype) - wide_base)
    for model, coefficient in zip(secondaries, coefficients, strict=True):
        displacement = displacement + torch.tensor(coefficient, dtype=dtype) * (model.to(dtype) - wide_base)
    blended = _displaced(wide_base, displacement, attention_scale)

    final_dtype = _result_dtype(primary, out_dtype, dtype)
    others = merge_other(base, primary, scale=attention_scale, out_dtype=out_dtype, dtype=dtype)
    mask = _element_mask(selected, primary.shape, head_axis)
    return MergedTensor(
        value=torch.where(mask, blended.to(final_dtype), others),
        selected=tuple(selected.nonzero().flatten().tolist()),
        squared_scores=squared,
    )


def merge_other(
    base: Tensor,
    primary: Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A tensor that is not merged: ``B + scale * tv1``, any shape; precision and output dtype as for `merge_tensor`.

    At scale 1 this is primary itself, not ``B + (M1 - B)``, which rounds. Without a cast, the given tensor is returned,
    not a copy.
    """
    final_dtype = _result_dtype(primary, out_dtype, dtype)
    if scale == 1:
        return primary.to(final_dtype)
    wide_base = base.to(dtype)
    tv1 = primary.to(dtype) - wide_base
    return _displaced(wide_base, tv1, scale).to(final_dtype)


def _listed(secondary: Tensor | list[Tensor]) -> list[Tensor]:
    """The secondaries as a list; a single one may be given without a list."""
    return [secondary] if isinstance(secondary, Tensor) else list(secondary)


def _displaced(base: Tensor, displacement: Tensor, scale: float) -> Tensor:
    """``base + scale * displacement``, with the scale rounded to the tensors' dtype."""
    if scale == 1:
        return base + displacement
    return base + torch.tensor(scale, dtype=base.dtype) * displacement


def _result_dtype(primary: Tensor, out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float64:
        return torch.float64
    return primary.dtype if out_dtype is None else out_dtype


def _element_mask(selected: Tensor, shape: torch.Size, head_axis: int) -> Tensor:
    """Expand a bool [H] to a bool that broadcasts to ``shape``: each head's flag covers its run of ``head_axis``."""
    flags = selected.repeat_interleave(shape[head_axis] // selected.numel())
    return flags.view([-1 if axis == head_axis else 1 for axis in range(len(shape))])
