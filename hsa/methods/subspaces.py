"""Singular value decompositions for the subspace methods: directions, polar factors, and the displacements from them.

A decomposition comes from the Gram matrix of the smaller side in float64: `A'A = W S^2 W'`, `U = A W / S`. Squaring
halves the number of correct digits, and float64 has enough: singular values up to `max(m, n) * 2**-23` of the largest
count as zero, so the relative error of the smallest that is kept stays below 1e-6. Matrices of up to `SMALL` rows and
columns, for which this limit is lower, are decomposed directly.

Results depend on numpy's LAPACK and on the number of its threads. So a backend uses one thread for methods that name
`lapack` among their libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Arrays

Orthogonalize = Literal["polar", "newton-schulz"]

EPS = 2.0**-23
"""The spacing of float32 numbers at 1. Task vectors are float32, so no direction is known better than by this."""

SMALL = 256
"""The most rows and columns of a matrix that is decomposed directly, without its Gram matrix."""

START = 1.5
"""Upper limit of the largest singular value with which Newton-Schulz begins. It converges from below the root of 3."""

RESIDUAL = 1e-6
"""The residual at which Newton-Schulz ends: the largest norm of a column of the Gram matrix minus identity."""


Decompose = Callable[[int, "Array"], "Arrays"]
"""A function that returns the result of `decompose` for a float64 matrix [m, n] that depends only on the sources. The
number identifies the matrix: that of a model for its task vector, or 0 for the sum of all. An earlier result may be
returned again."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular triples of a matrix [m, n], the largest first, in float64.

    `values` are the singular values that do not count as zero, and `zeros` counts those that do. `left` [m, q] and
    `right` [n, q] are the singular vectors of the first q `values`.
    """

    left: Array
    right: Array
    values: Array
    zeros: int

    @property
    def count(self) -> int:
        """The number of directions whose vectors are included."""
        return int(self.left.shape[1])


def directions(
    matrix: Array,
    count: int,
    *,
    largest: float | None = None,
    zeros: int | None = None,
    decomposed: Arrays | None = None,
) -> Directions:
    """The first directions of a float64 matrix [m, n], at most `count`.

    Singular values with `s <= max(m, n) * EPS * s_1` count as zero; `largest` replaces `s_1`. If `zeros` is given, that
    many count as zero instead, and ValueError is raised if that is impossible. `decomposed` is the result of
    `decompose` for the matrix.

    Example:
        >>> import numpy as np
        >>> found = directions(np.diag([3.0, 2.0, 0.0]), 1)
        >>> found.values, found.zeros, found.count
        (array([3., 2.]), 1, 1)
    """
    import numpy as np

    left, values, right = decompose(matrix) if decomposed is None else decomposed
    assert values is not None
    largest = float(values.max(initial=0.0)) if largest is None else largest
    kept = int(np.count_nonzero(values > max(matrix.shape) * EPS * largest))
    if zeros is not None:
        kept = len(values) - zeros
        if not 0 <= kept <= np.count_nonzero(values):
            raise ValueError(f"{zeros} of {len(values)} directions cannot be the zeros of this matrix")
    zeros, values = len(values) - kept, values[:kept]
    count = min(count, kept)
    if left is None:
        assert right is not None
        left = (matrix @ right[:, :count]) / values[:count]
    elif right is None:
        right = (matrix.T @ left[:, :count]) / values[:count]
    return Directions(left[:, :count], right[:, :count], values, zeros)


def decompose(matrix: Array) -> Arrays:
    """Left singular vectors, singular values and right singular vectors, the largest first. If only the vectors of the
    shorter side were computed, those of the longer side are None."""
    import numpy as np

    rows, columns = matrix.shape
    if max(rows, columns) <= SMALL or not rows or not columns:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left, values, right.T
    squares, vectors = np.linalg.eigh(_gram(matrix))
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    vectors = vectors[:, ::-1]
    return (None, values, vectors) if columns <= rows else (vectors, values, None)


def largest_singular_value(matrix: Array) -> float:
    """The largest singular value `s_1` of a float64 matrix; 0 for an empty one."""
    import numpy as np

    if not matrix.size:
        return 0.0
    if max(matrix.shape) <= SMALL:
        return float(np.linalg.norm(matrix, 2))
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(_gram(matrix))[-1])))


def polar_factor(matrix: Array) -> Array:
    """`U V'` of a float64 matrix `U S V'`, without the directions that count as zero."""
    import numpy as np

    factor: Array
    rows, columns = matrix.shape
    if max(rows, columns) <= SMALL or not rows or not columns:
        found = directions(matrix, min(rows, columns))
        factor = found.left @ found.right.T
        return factor
    squares, vectors = np.linalg.eigh(_gram(matrix))
    values = np.sqrt(np.maximum(squares, 0.0))
    kept = values > max(rows, columns) * EPS * values[-1]
    vectors = vectors[:, kept]
    root = (vectors / values[kept]) @ vectors.T
    factor = matrix @ root if columns <= rows else root @ matrix
    return factor


def newton_schulz(matrix: Array, bound: float) -> Array | None:
    """The polar factor of a float64 matrix by the Newton-Schulz iteration; None if it did not converge.

    `X <- X (3 - X'X) / 2`, or `(3 - XX') X / 2` if there are more columns than rows. `bound` is at least the largest
    singular value. The iteration has fewer steps than a singular value that counts as zero would need.
    """
    import numpy as np

    rows, columns = matrix.shape
    if not rows or not columns:
        return matrix
    x: Array = matrix * (START / bound)
    left = _steps(max(rows, columns))
    while True:
        step = _gram(x)
        diagonal = np.einsum("ii->i", step)
        diagonal -= 1.0
        residual = math.sqrt(float(np.einsum("ij,ij->j", step, step).max()))
        if residual <= RESIDUAL or left == 0:
            return x if residual <= RESIDUAL else None
        left -= 1
        step *= -0.5
        diagonal += 1.0
        x = x @ step if columns <= rows else step @ x


def _steps(longer: int) -> int:
    """The number of Newton-Schulz steps: two fewer than the largest singular value that counts as zero would need. One
    fewer might suffice for it, because a residual is spread over the columns."""
    x, steps = START * longer * EPS, -2
    while abs(1.0 - x * x) > RESIDUAL:
        x, steps = x * (3.0 - x * x) / 2.0, steps + 1
    return max(steps, 0)


def _gram(matrix: Array) -> Array:
    """The Gram matrix of the shorter side."""
    rows, columns = matrix.shape
    gram: Array = matrix.T @ matrix if columns <= rows else matrix @ matrix.T
    return gram


# --- displacements of the methods ----------------------------------------------------------------------------------


def boosted(values: Array, beta: float) -> Array:
    """Singular values, largest first, of which the small ones are raised. All values after the first one at which the
    running sum reaches `beta` of the total are raised to that one.

    Example:
        >>> import numpy as np
        >>> boosted(np.array([4.0, 3.0, 2.0, 1.0]), 0.5)
        array([4., 3., 3., 3.])
    """
    import numpy as np

    if not values.size:
        return values
    running = np.cumsum(values)
    at = min(int(np.count_nonzero(running < beta * running[-1])), len(values) - 1)
    raised: Array = np.maximum(values, values[at])
    return raised


def common_and_own(rank: int, models: int, common_share: float) -> tuple[int, int]:
    """The number of directions that Iso-CTS takes of the sum of the task vectors, and of each of them, `rank` in all.

    The models' part is rounded to a multiple of their number (half to even), but down if rounding up would exceed
    `rank`.

    Example:
        >>> common_and_own(768, 3, 0.8)
        (615, 51)
    """
    own = min(round((rank - int(common_share * rank)) / models), rank // models)
    return rank - models * own, own


@dataclass(frozen=True, eq=False)
class Displacement:
    """The matrix that a method adds to base at a lambda of 1, float64 [m, n], and how it was computed.

    `taken` and `zeros` count, for each decomposed matrix, the directions that were taken and those that count as zero.
    `scale` is the mean of the spectrum, if all directions have it. `replaced` counts the polar factors for which
    Newton-Schulz did not converge.
    """

    matrix: Array
    taken: tuple[int, ...]
    zeros: tuple[int, ...]
    scale: float | None = None
    replaced: int = 0


@dataclass(frozen=True)
class Known:
    """Values of a matrix that a record contains, so that they are not computed again: its `zeros` and its `scale`."""

    zeros: tuple[int, ...]
    scale: float | None

    def of(self, number: int) -> int:
        """The zeros of a decomposed matrix. Raises IndexError if there are fewer matrices."""
        return self.zeros[number]


def _anew(number: int, matrix: Array) -> Arrays:
    """A `Decompose` that caches nothing."""
    return decompose(matrix)


def task_singular_vectors(
    vectors: Sequence[Array],
    counts: Sequence[int],
    beta: float | None = None,
    how: Orthogonalize = "polar",
    known: Known | None = None,
    decomposed: Decompose = _anew,
) -> Displacement:
    """TSV-M of task vectors float32 [m, n]: the first directions of each, concatenated. `counts` says how many of each.

    Unless `beta` is None, the singular values are first `boosted` by it.
    """
    import numpy as np

    parts, values = [], []
    for number, (vector, count) in enumerate(zip(vectors, counts, strict=True)):
        matrix = vector.astype(np.float64)
        zeros = None if known is None else known.of(number)
        part = directions(matrix, count, zeros=zeros, decomposed=decomposed(number, matrix))
        values.append((part.values if beta is None else boosted(part.values, beta))[: part.count])
        parts.append(part)
    left, left_replaced = _polar_of_parts([part.left for part in parts], how)
    right, right_replaced = _polar_of_parts([part.right for part in parts], how)
    left = left * np.concatenate(values)
    return _put_together(parts, left @ right.T, None, left_replaced + right_replaced)


def isotropic(
    vectors: Sequence[Array], counts: Sequence[int], known: Known | None = None, decomposed: Decompose = _anew
) -> Displacement:
    """Iso-C of task vectors float32 [m, n]: their sum, with all singular values that do not count as zero replaced by
    their mean. `counts` contains one number: the most directions that are taken."""
    [most] = counts
    total = _sum(vectors)
    part = directions(total, most, zeros=None if known is None else known.of(0), decomposed=decomposed(0, total))
    scale = _mean(part.values) if known is None or known.scale is None else known.scale
    return _put_together([part], (part.left * scale) @ part.right.T, scale)


def common_and_specific(
    vectors: Sequence[Array], counts: Sequence[int], known: Known | None = None, decomposed: Decompose = _anew
) -> Displacement:
    """Iso-CTS of task vectors float32 [m, n]: the first directions of their sum, and the first directions of the rest
    of each, concatenated, with the mean of their singular values. `counts` says how many of the sum, then of each."""
    import numpy as np

    total = _sum(vectors)
    part = directions(total, counts[0], zeros=None if known is None else known.of(0), decomposed=decomposed(0, total))
    parts, common = [part], part.left
    for number, (vector, count) in enumerate(zip(vectors, counts[1:], strict=True), 1):
        beside = vector.astype(np.float64)
        zeros = None if known is None else known.of(number)
        largest = largest_singular_value(beside) if zeros is None and count else 0.0
        beside -= common @ (common.T @ beside)
        parts.append(directions(beside, count, largest=largest, zeros=zeros))
    left, _ = _polar_of_parts([part.left for part in parts], "polar")
    right, _ = _polar_of_parts([part.right for part in parts], "polar")
    scale = known.scale if known is not None else None
    if scale is None:
        scale = _mean(np.concatenate([part.values[: part.count] for part in parts]))
    return _put_together(parts, (left * scale) @ right.T, scale)


def _put_together(
    parts: Sequence[Directions], matrix: Array, scale: float | None = None, replaced: int = 0
) -> Displacement:
    taken, zeros = tuple(part.count for part in parts), tuple(part.zeros for part in parts)
    return Displacement(matrix, taken, zeros, scale, replaced)


def _polar_of_parts(parts: Sequence[Array], how: Orthogonalize) -> tuple[Array, bool]:
    """The polar factor of matrices side by side, each with orthonormal columns. The flag says whether Newton-Schulz was
    requested and had to be replaced."""
    import numpy as np

    matrix = np.concatenate(parts, axis=1)
    factor = newton_schulz(matrix, math.sqrt(len(parts))) if how == "newton-schulz" else None
    return (polar_factor(matrix), how == "newton-schulz") if factor is None else (factor, False)


def _sum(vectors: Sequence[Array]) -> Array:
    import numpy as np

    first, *others = vectors
    total = first.astype(np.float64)
    for vector in others:
        total += vector
    return total


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else 0.0


def work_bytes(rows: int, columns: int, models: int, taken: int) -> int:
    """The approximate bytes of memory for merging a matrix with `taken` directions in all: float32 copies of what is
    read and written, the matrix in float64, three copies of the singular vectors, and the workspace of LAPACK."""
    elements, short = rows * columns, min(rows, columns)
    float32 = (models + 3) * elements * 4
    vectors = 3 * (rows + columns) * taken * 8
    return float32 + elements * 8 + vectors + 6 * min(max(short, taken), max(rows, columns)) ** 2 * 8
