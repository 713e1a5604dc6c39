"""The oracles of the subspace methods against their defining properties, and against matrices with known directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsa.reference import subspaces as oracle

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1), (1, 1), (40, 33)]
METHODS = [oracle.tsv_m, oracle.tsv_m_boosted, oracle.iso_c, oracle.iso_cts]
F64 = torch.float64


def drawn(shape: tuple[int, ...], count: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """A base and models in float64; of a rank, where one is given, are the task vectors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*of: int) -> Tensor:
        return torch.randn(of, generator=generator, dtype=F64)

    base = draw(*shape)
    if rank is None:
        return base, [base + 0.1 * draw(*shape) for _ in range(count)]
    rows, columns = shape
    return torch.zeros_like(base), [draw(rows, rank) @ draw(rank, columns) for _ in range(count)]


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one - two).norm()) <= tolerance * max(1.0, float(two.norm()))


# --- directions and polar factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_give_the_matrix_back(shape: tuple[int, int]) -> None:
    matrix = drawn(shape, 1)[0]
    parts = oracle.directions(matrix)
    assert parts.dropped == 0
    assert close(parts.left * parts.values @ parts.right.T, matrix)


@pytest.mark.parametrize(("small", "kept"), [(2 * 4 * oracle.EPS, 2), (1.01 * 4 * oracle.EPS, 2), (4 * oracle.EPS, 1)])
def test_a_direction_is_dropped_up_to_the_longer_side_times_eps(small: float, kept: int) -> None:
    matrix = torch.zeros(4, 3, dtype=F64)
    matrix[0, 0], matrix[1, 2] = 8.0, 8.0 * small
    parts = oracle.directions(matrix)
    assert (len(parts.values), parts.dropped) == (kept, 3 - kept)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 3)])
def test_nothing_has_no_direction(shape: tuple[int, int]) -> None:
    parts = oracle.directions(torch.zeros(shape, dtype=F64))
    assert parts.left.shape == (shape[0], 0)
    assert parts.right.shape == (shape[1], 0)
    assert parts.dropped == min(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factors_are_orthogonal_and_leave_a_symmetric_positive_matrix(shape: tuple[int, int]) -> None:
    matrix = drawn(shape, 1)[0]
    factor = oracle.polar(matrix)
    identity = torch.eye(min(shape), dtype=F64)
    gram = factor.T @ factor if shape[0] >= shape[1] else factor @ factor.T
    assert close(gram, identity)
    rest = factor.T @ matrix
    assert close(rest, rest.T)
    assert float(torch.linalg.eigvalsh(rest).min()) >= -1e-12


def test_polar_factor_of_a_matrix_of_lower_rank_is_a_partial_isometry() -> None:
    matrix = drawn((9, 6), 1, rank=2)[1][0]
    assert torch.allclose(spectrum(oracle.polar(matrix)), torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=F64), atol=1e-12)


# --- TSV-M -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [oracle.tsv_m, oracle.tsv_m_boosted])
def test_one_model_with_share_1_comes_back(method: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    base, models = drawn(shape, 1)
    beta = {"beta": 1.0} if method is oracle.tsv_m_boosted else {}
    assert close(method(base, models, share=1.0, dtype=F64, **beta), models[0])
    assert close(method(base, models, dtype=F64, **beta), models[0])


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_one_model_is_truncated_to_its_first_directions(share: float) -> None:
    base, models = drawn((8, 5), 1)
    merged = oracle.tsv_m(base, models, share=share, dtype=F64) - base
    count = int(share * 5)
    wanted = torch.cat([spectrum(models[0] - base)[:count], torch.zeros(5 - count, dtype=F64)])
    assert torch.allclose(spectrum(merged), wanted, atol=1e-12)


def test_models_in_orthogonal_directions_add_up() -> None:
    """Nothing is in the way of a direction, so the polar factors are the directions themselves."""
    base = torch.zeros(6, 6, dtype=F64)
    first, second = base.clone(), base.clone()
    first[0, 0], first[1, 1], first[2, 2] = 3, 2, 1
    second[3, 3], second[4, 5], second[5, 4] = 5, 4, 3
    assert close(oracle.tsv_m(base, [first, second], dtype=F64), first + second)
    only_two = oracle.tsv_m(base, [first, second], share=0.4, dtype=F64)
    assert close(only_two, torch.diag(torch.tensor([3.0, 2, 0, 5, 0, 0], dtype=F64)) + 4.0 * _unit(4, 5))


def test_equal_models_give_that_model_truncated() -> None:
    base, models = drawn((7, 6), 1)
    merged = oracle.tsv_m(base, models * 3, dtype=F64)
    assert close(merged, oracle.tsv_m(base, models, share=1 / 3, dtype=F64))


def test_more_columns_than_can_be_orthogonal() -> None:
    base, models = drawn((5, 8), 3)
    merged = oracle.tsv_m(base, models, share=1.0, dtype=F64) - base
    parts = [oracle.directions(model - base) for model in models]
    left, values, right = oracle.assembled(parts, base.shape)
    assert left.shape == (5, 15)
    assert close(left @ left.T, torch.eye(5, dtype=F64))
    assert close(merged, left * values @ right.T)


@pytest.mark.parametrize(("rank", "models", "share", "count"), [
    (768, 3, None, 256), (1280, 3, None, 426), (7, 7, None, 1), (2, 3, None, 0), (5, 1, None, 5),
    (10, 3, 0.35, 3), (10, 3, 1.0, 10), (10, 3, 0.0, 0), (3, 3, 1 / 3, 1),
])  # fmt: skip
def test_directions_of_each_model(rank: int, models: int, share: float | None, count: int) -> None:
    assert oracle.kept_of_each(rank, models, share) == count


@pytest.mark.parametrize(("beta", "wanted"), [
    (0.0, [4, 4, 4, 4]), (0.4, [4, 4, 4, 4]), (0.41, [4, 3, 3, 3]), (0.7, [4, 3, 3, 3]), (0.71, [4, 3, 2, 2]),
    (0.9, [4, 3, 2, 2]), (1.0, [4, 3, 2, 1]),
])  # fmt: skip
def test_singular_values_are_raised_from_the_point_where_their_sum_reaches_beta(beta: float, wanted: list[int]) -> None:
    values = torch.tensor([4.0, 3, 2, 1], dtype=F64)
    assert oracle.boosted(values, beta).tolist() == wanted


def test_dropped_directions_are_not_boosted() -> None:
    base, models = drawn((9, 7), 1, rank=3)
    merged = oracle.tsv_m_boosted(base, models, beta=0.0, dtype=F64)
    assert torch.allclose(spectrum(merged)[:3], spectrum(models[0])[0])
    assert float(spectrum(merged)[3]) < 1e-12 * float(spectrum(merged)[0])


# --- Iso-C and Iso-CTS -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "count"), [(oracle.iso_c, 1), (oracle.iso_c, 3), (oracle.iso_cts, 1)])
def test_all_singular_values_are_equal(method: Callable[..., Tensor], count: int, shape: tuple[int, int]) -> None:
    base, models = drawn(shape, count)
    values = spectrum(method(base, models, dtype=F64) - base)
    wanted = spectrum(sum(model - base for model in models)).mean()  # type: ignore[union-attr, arg-type]
    assert torch.allclose(values, wanted.expand(min(shape)), rtol=1e-11)


@pytest.mark.parametrize("common_share", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_model_has_nothing_beside_what_is_common(shape: tuple[int, int], common_share: float) -> None:
    base, models = drawn(shape, 1)
    merged = oracle.iso_cts(base, models, common_share=common_share, dtype=F64)
    assert close(merged, oracle.iso_c(base, models, dtype=F64), 1e-10)


def test_all_common_is_iso_c() -> None:
    base, models = drawn((9, 7), 3)
    assert close(oracle.iso_cts(base, models, common_share=1.0, dtype=F64), oracle.iso_c(base, models, dtype=F64))


def test_directions_of_one_model_beside_the_common_ones() -> None:
    """Of two models with directions of their own the strongest are the sum's, and the rest come from each."""
    base = torch.zeros(4, 4, dtype=F64)
    first, second = base.clone(), base.clone()
    first[0, 0], first[1, 1] = 9, 2
    second[2, 2], second[3, 3] = 8, 1
    merged = oracle.iso_cts(base, [first, second], common_share=0.5, dtype=F64)
    assert close(merged, torch.eye(4, dtype=F64) * 5.0)


@pytest.mark.parametrize(("rank", "models", "share", "wanted"), [
    (768, 3, 0.8, (615, 51)),  # 154 / 3 = 51.33
    (768, 8, 0.8, (616, 19)),  # 154 / 8 = 19.25
    (10, 4, 0.0, (2, 2)),  # 2.5 is halfway: to even
    (14, 4, 0.0, (2, 3)),  # 3.5 is halfway: to even would be 4, and 16 directions are more than 14
    (2, 3, 0.0, (2, 0)),  # 0.67 would be rounded to 1, and 3 directions are more than 2
    (1, 2, 0.0, (1, 0)), (1, 1, 0.0, (0, 1)), (5, 2, 1.0, (5, 0)), (0, 3, 0.8, (0, 0)),
])  # fmt: skip
def test_how_many_directions_are_common(rank: int, models: int, share: float, wanted: tuple[int, int]) -> None:
    assert oracle.common_and_own(rank, models, share) == wanted


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_sources_have_no_more_directions_than_their_rank(rank: int) -> None:
    base, models = drawn((12, 10), 2, rank=rank)
    for method in (oracle.tsv_m, oracle.iso_c, oracle.iso_cts):
        values = spectrum(method(base, models, dtype=F64))
        assert int((values > 1e-9 * values[0]).sum()) == min(2 * rank, 10)
    common = oracle.directions(models[0] + models[1])
    assert common.dropped == 10 - 2 * rank
    isotropic = spectrum(oracle.iso_c(base, models, dtype=F64))[: 2 * rank]
    assert torch.allclose(isotropic, common.values.mean().expand(2 * rank))


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0, -1.0])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (2, 3, 4)])
def test_lambda_scales(method: Callable[..., Tensor], lam: float, shape: tuple[int, ...]) -> None:
    base, models = drawn(shape, 2)
    full = method(base, models, dtype=F64) - base
    assert close(method(base, models, lam=lam, dtype=F64) - base, lam * full)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (3, 0), (0,), ()])
def test_zero_task_vectors_leave_base(method: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    base = drawn(shape, 0)[0].float()
    assert torch.equal(method(base, [base.clone()] * 3), base)


@pytest.mark.parametrize("method", METHODS)
def test_one_zero_task_vector_among_others(method: Callable[..., Tensor]) -> None:
    base, models = drawn((8, 6), 2)
    merged = method(base, [*models, base], dtype=F64)
    assert bool(merged.isfinite().all())
    assert not torch.equal(merged, base)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_models_makes_no_difference(method: Callable[..., Tensor]) -> None:
    base, models = drawn((9, 7), 3)
    assert close(method(base, models[::-1], dtype=F64), method(base, models, dtype=F64), 1e-10)


@pytest.mark.parametrize("method", [oracle.tsv_m, oracle.tsv_m_boosted, oracle.iso_c])
def test_transposed_weights_merge_to_the_transposed(method: Callable[..., Tensor]) -> None:
    """Iso-CTS has no such symmetry: it projects what is common out of one side."""
    base, models = drawn((9, 7), 3)
    assert close(method(base.T, [model.T for model in models], dtype=F64), method(base, models, dtype=F64).T, 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (4, 6)])
def test_all_but_matrices_are_averaged(method: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    base, models = drawn(shape, 3)
    base, models = base.float(), [model.half() for model in models]
    name = "decoder.embed_tokens.weight" if len(shape) == 2 else "decoder.conv.weight"
    coefficient = torch.tensor(0.7 / 3)
    first, second, third = (coefficient * (model.float() - base) for model in models)
    merged = method(base, models, lam=0.7, name=name)
    assert merged.dtype == torch.float16
    assert torch.equal(merged, (base + (first + second + third)).half())


@pytest.mark.parametrize(("name", "matrix"), [
    ("encoder.layers.0.self_attn.q_proj.weight", True), ("encoder.layers.0.fc1.weight", True), ("", True),
    ("lstm.weight_ih_l0", True), ("embedder.encoder.fc1.weight", True),
    ("decoder.embed_tokens.weight", False), ("encoder.embed_positions.weight", False), ("wte.weight", False),
    ("proj_out.weight", False), ("lm_head.weight", False), ("self_attn.pos_bias_u", False), ("shared.weight", False),
    ("layers.0.attention.rel_attn_embed.weight", False),
])  # fmt: skip
def test_matrices_by_their_names(name: str, matrix: bool) -> None:
    assert oracle.is_matrix(name, (4, 4)) is matrix
    assert not oracle.is_matrix(name, (4,))
    assert not oracle.is_matrix(name, (4, 4, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)])
def test_float32_results_lie_near_those_of_float64(method: Callable[..., Tensor], dtypes: tuple[Any, Any]) -> None:
    base, models = drawn((20, 16), 3)
    base, models = base.to(dtypes[0]), [model.to(dtypes[1]) for model in models]
    exact = method(base, models, dtype=F64)
    assert exact.dtype == F64
    merged = method(base, models, out_dtype=torch.float32)
    assert merged.dtype == torch.float32
    assert method(base, models).dtype == dtypes[1]
    assert float((merged.double() - exact).norm()) <= 1e-6 * float(exact.norm())


def _unit(row: int, column: int) -> Tensor:
    unit = torch.zeros(6, 6, dtype=F64)
    unit[row, column] = 1.0
    return unit
