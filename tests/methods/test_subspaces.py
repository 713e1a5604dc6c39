"""The decompositions in numpy against the oracle's, and what makes their results repeat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hsa.methods import subspaces
from hsa.reference import subspaces as oracle
from hsa.system import lapack

TOLERANCE = 1e-4
"""Of the norm of what is added to base: stricter than the tolerance of outputs, which is of the tensor's norm."""

KINDS = ["random", "low rank", "shared factor", "steep", "equal"]
CASES = [
    *((kind, shape) for kind in KINDS for shape in ((40, 33), (7, 9))),
    *(("random", shape) for shape in ((33, 40), (9, 9), (1, 9), (9, 1), (1, 1))),
]
"""Kinds of task vectors, and shapes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch and of BLAS wait for each other longer than they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with lapack.one_thread:
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["small", "by Gram matrices"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are decomposed themselves, or by their Gram matrices."""
    if request.param != "small":
        monkeypatch.setattr(subspaces, "SMALL", 8)


def vectors(kind: str, shape: tuple[int, int], count: int) -> list[Any]:
    """Task vectors of a kind, float32."""
    rng = np.random.default_rng(5)
    rows, columns = shape
    short = min(shape)
    if kind == "random":
        drawn = [rng.standard_normal(shape) for _ in range(count)]
    elif kind == "low rank":
        drawn = [rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns)) for _ in range(count)]
    elif kind == "shared factor":
        factor = rng.standard_normal((3, columns))
        drawn = [rng.standard_normal((rows, 3)) @ factor for _ in range(count)]
    elif kind == "steep":
        falling = np.logspace(0, -3, short)
        sides = [(np.linalg.qr(rng.standard_normal((n, short)))[0] for n in shape) for _ in range(count)]
        drawn = [left * falling @ right.T for left, right in sides]
    else:
        drawn = [rng.standard_normal(shape)] * count
    return [np.float32(0.01 * matrix) for matrix in drawn]


def in_torch(matrices: list[Any], shape: tuple[int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.zeros(shape, dtype=torch.float64), [torch.from_numpy(matrix).double() for matrix in matrices]


def assert_near(found: subspaces.Displacement, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    size = max(float(wanted.norm()), 1e-30)
    assert float(np.linalg.norm(found.matrix - wanted.numpy())) <= tolerance * size


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", ["polar", "newton-schulz"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_task_singular_vectors(kind: str, shape: tuple[int, int], count: int, how: Any) -> None:
    matrices = vectors(kind, shape, count)
    base, models = in_torch(matrices, shape)
    for share in (None, 0.7, 1.0):
        taken = oracle.kept_of_each(min(shape), count, share)
        found = subspaces.task_singular_vectors(matrices, (taken,) * count, None, how)
        assert_near(found, oracle.tsv_m(base, models, share=share, dtype=torch.float64))
        rank = min(shape) if kind in ("random", "steep", "equal") else min(*shape, 3)
        assert found.zeros == (min(shape) - rank,) * count
        assert found.taken == (min(taken, rank),) * count


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_boosted_singular_vectors(kind: str, shape: tuple[int, int], beta: float) -> None:
    matrices = vectors(kind, shape, 2)
    base, models = in_torch(matrices, shape)
    found = subspaces.task_singular_vectors(matrices, (min(shape) // 2,) * 2, beta)
    assert_near(found, oracle.tsv_m_boosted(base, models, beta=beta, dtype=torch.float64))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_isotropic(kind: str, shape: tuple[int, int], count: int) -> None:
    matrices = vectors(kind, shape, count)
    base, models = in_torch(matrices, shape)
    found = subspaces.isotropic(matrices, (min(shape),))
    assert_near(found, oracle.iso_c(base, models, dtype=torch.float64))
    assert found.scale == pytest.approx(float(oracle.directions(sum(models)).values.mean()))  # type: ignore[arg-type]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("common_share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_common_and_specific(kind: str, shape: tuple[int, int], count: int, common_share: float) -> None:
    matrices = vectors(kind, shape, count)
    base, models = in_torch(matrices, shape)
    common, own = oracle.common_and_own(min(shape), count, common_share)
    found = subspaces.common_and_specific(matrices, (common, *(own,) * count))
    assert_near(found, oracle.iso_cts(base, models, common_share=common_share, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(300, 257), (257, 300)])
@pytest.mark.parametrize("kind", KINDS)
def test_larger_matrices(kind: str, shape: tuple[int, int]) -> None:
    matrices = vectors(kind, shape, 3)
    base, models = in_torch(matrices, shape)
    for how in ("polar", "newton-schulz"):
        found = subspaces.task_singular_vectors(matrices, (85,) * 3, None, how)  # type: ignore[arg-type]
        assert_near(found, oracle.tsv_m(base, models, dtype=torch.float64))
    assert_near(subspaces.isotropic(matrices, (257,)), oracle.iso_c(base, models, dtype=torch.float64))
    found = subspaces.common_and_specific(matrices, (206, 17, 17, 17))
    assert_near(found, oracle.iso_cts(base, models, dtype=torch.float64))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(4, 3), (60, 50), (0, 3), (3, 0)])
def test_nothing_but_zeros(shape: tuple[int, int]) -> None:
    matrices = [np.zeros(shape, np.float32)] * 2
    for found in (
        subspaces.task_singular_vectors(matrices, (2, 2), 0.3, "newton-schulz"),
        subspaces.isotropic(matrices, (min(shape),)),
        subspaces.common_and_specific(matrices, (1, 1, 1)),
    ):
        assert found.matrix.shape == shape
        assert not found.matrix.any()
        assert set(found.taken) == {0}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(9, 7), (60, 50)])
def test_recorded_zeros_and_scale_are_applied(shape: tuple[int, int]) -> None:
    matrices, rank = vectors("random", shape, 2), min(shape)
    found = subspaces.isotropic(matrices, (rank,), subspaces.Known((2,), 0.5))
    values = np.linalg.svd(found.matrix, compute_uv=False)
    assert np.allclose(values, [0.5] * (rank - 2) + [0.0] * 2, atol=1e-12)
    recorded = subspaces.Known((rank - 1, 0), None)
    assert subspaces.task_singular_vectors(matrices, (3, 3), known=recorded).taken == (1, 3)
    assert subspaces.common_and_specific(matrices, (3, 1, 1), subspaces.Known((0, 3, 3), 0.25)).scale == 0.25
    for wrong in (-1, rank + 1):
        with pytest.raises(ValueError, match="cannot be the zeros"):
            subspaces.isotropic(matrices, (rank,), subspaces.Known((wrong,), None))
    with pytest.raises(ValueError, match="cannot be the zeros"):
        subspaces.isotropic([np.zeros(shape, np.float32)], (rank,), subspaces.Known((0,), None))


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (300, 280), (270, 300)])
def test_newton_schulz_ends_at_its_residual(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal(shape)
    factor = subspaces.newton_schulz(matrix, float(np.linalg.norm(matrix, 2)))
    assert factor is not None
    gram = factor.T @ factor if shape[0] >= shape[1] else factor @ factor.T
    assert np.linalg.norm(gram - np.eye(min(shape)), axis=0).max() <= subspaces.RESIDUAL
    assert np.linalg.norm(factor - subspaces.polar_factor(matrix)) <= 1e-5 * np.sqrt(min(shape))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (300, 260)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_newton_schulz_does_not_converge_on_a_matrix_of_lower_rank(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    assert subspaces.newton_schulz(matrix, max(1.0, float(np.linalg.norm(matrix, 2)))) is None


def test_models_with_directions_in_common_have_newton_schulz_replaced() -> None:
    matrices = vectors("shared factor", (60, 50), 2)
    assert subspaces.task_singular_vectors(matrices, (25, 25), None, "newton-schulz").replaced == 1
    assert subspaces.task_singular_vectors(matrices, (25, 25)).replaced == 0


def test_results_repeat_wherever_they_lie_in_memory_and_whatever_runs_beside() -> None:
    matrices = vectors("steep", (300, 290), 2)
    shifted = []
    for matrix in matrices:
        memory = np.empty(matrix.size + 3, np.float32)
        memory[3:] = matrix.ravel()
        shifted.append(memory[3:].reshape(matrix.shape))
    results: list[bytes] = []

    def compute(of: list[Any]) -> None:
        with lapack.one_thread:
            results.append(subspaces.task_singular_vectors(of, (145, 145)).matrix.tobytes())

    threads = [threading.Thread(target=compute, args=(of,)) for of in (matrices, shifted, matrices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compute(shifted)
    assert len(results) == 4
    assert len(set(results)) == 1


def test_the_oracle_counts_common_directions_alike() -> None:
    for rank in (0, 1, 2, 5, 14, 768):
        for models in (1, 2, 3, 8):
            for share in (0.0, 0.3, 0.8, 1.0):
                wanted = oracle.common_and_own(rank, models, share)
                assert subspaces.common_and_own(rank, models, share) == wanted
