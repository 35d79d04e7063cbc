"""Measures of interference against their definitions on dense matrices, and what chance gives."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from hard_cases import in_another_basis
from hypothesis import given
from hypothesis import strategies as st

from lori_nb.analysis import interference
from lori_nb.analysis.interference import ALL, similarity_curve
from lori_nb.analysis.nulls import (
    TOTAL,
    by_pair,
    expected,
    norms,
    null_draws,
    null_set,
    null_update,
    where_defined,
)
from lori_nb.analysis.overlap import REGISTERED, Pair, measure, overlap_table, subspace_overlap, total_cosine
from lori_nb.analysis.reduced import reduced
from lori_nb.method.adapters import Factors
from lori_nb.method.subspaces import random_down_projection

D_OUT, D_IN = 18, 25
U = np.finfo(np.float64).eps


def noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, rank: int = 4, scale: float = 1.5) -> Factors:
    return Factors(noise(rank, D_IN, 2 * seed), noise(D_OUT, rank, 2 * seed + 1), scale)


def value(name: str, f: Factors, g: Factors) -> float:
    return REGISTERED[name].value(Pair(reduced(f), reduced(g)))


ONE, TWO = factors(0), factors(1, 3, -0.7)
BANK = {
    "plain": (ONE, TWO),
    "shared A": (ONE, Factors(ONE.A, factors(5).B, 0.3)),
    "repeated": (ONE, ONE),
    "opposite": (ONE, Factors(ONE.A, -2 * ONE.B, ONE.scale)),
    "rank deficient": (Factors(torch.cat([ONE.A[:1]] * 4), ONE.B, 1.5), TWO),
    "sparse": (Factors(ONE.A, ONE.B * (ONE.B.abs() > 1), 1.5), Factors(TWO.A, TWO.B * (TWO.B.abs() > 0.5), 1.0)),
    "rank above a dimension": (factors(7, 22), factors(8, 20)),
    "an empty column": (Factors(ONE.A, ONE.B * torch.tensor([1, 0, 1, 0]), 1.5), TWO),
    "one module's scale is small": (Factors(ONE.A, 1e-9 * ONE.B, 1.0), TWO),
}


# The definitions, on dense matrices


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.B.numpy() @ f.A.numpy())


def dense_svd(X: np.ndarray):
    left, values, right = np.linalg.svd(X, full_matrices=False)
    rank = int((values > 1e-10 * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank].T


def row_angles(f: Factors, g: Factors) -> np.ndarray:
    return scipy.linalg.subspace_angles(*(dense_svd(dense(each))[2] for each in (f, g)))


def column_angles(f: Factors, g: Factors) -> np.ndarray:
    return scipy.linalg.subspace_angles(*(dense_svd(dense(each))[0] for each in (f, g)))


def dense_cosine(f: Factors, g: Factors) -> float:
    return np.vdot(dense(f), dense(g)) / np.linalg.norm(dense(f)) / np.linalg.norm(dense(g))


def dense_mask_overlap(f: Factors, g: Factors) -> float:
    kept = [{place for place in np.ndindex(*each.B.shape) if each.B[place] != 0} for each in (f, g)]
    return len(kept[0] & kept[1]) / min(map(len, kept)) if f.B.shape == g.B.shape else math.nan


def dense_alignment(f, g) -> float:
    left, values, _ = dense_svd(dense(g))
    k = next(k for k in range(1, len(values) + 1) if np.linalg.norm(values[:k]) >= 0.95 * np.linalg.norm(values))
    return np.linalg.norm(left[:, :k] @ left[:, :k].T @ dense(f)) / np.linalg.norm(dense(f))


def dense_singular_interference(f, g) -> float:
    parts = [dense_svd(dense(each)) for each in (f, g)]
    left, right = (np.concatenate([part[place] for part in parts], axis=1) for place in (0, 2))
    values = np.concatenate([part[1] for part in parts])
    unit = np.eye(len(values))
    return np.abs((left.T @ left - unit) @ np.diag(values) @ (right.T @ right - unit)).sum()


def dense_magnitude_overlap(f, g) -> float:
    chosen = []
    for each in (f, g):
        sizes = np.abs(dense(each)).ravel()
        chosen.append({n for n in np.argsort(-sizes)[: round(0.2 * D_OUT * D_IN)].tolist() if sizes[n] > 0})
    return len(chosen[0] & chosen[1]) / min(map(len, chosen))


DEFINITIONS = {
    "inner_product": lambda f, g: np.vdot(dense(f), dense(g)),
    "cosine": dense_cosine,
    "cosine_size": lambda f, g: abs(dense_cosine(f, g)),
    "row_overlap": lambda f, g: np.mean(np.cos(row_angles(f, g)) ** 2),
    "column_overlap": lambda f, g: np.mean(np.cos(column_angles(f, g)) ** 2),
    "row_grassmann": lambda f, g: np.linalg.norm(row_angles(f, g)),
    "column_grassmann": lambda f, g: np.linalg.norm(column_angles(f, g)),
    "row_chordal": lambda f, g: np.linalg.norm(np.sin(row_angles(f, g))),
    "column_chordal": lambda f, g: np.linalg.norm(np.sin(column_angles(f, g))),
    "alignment": dense_alignment,
    "singular_interference": dense_singular_interference,
    "sign_conflict": lambda f, g: (dense(f) * dense(g) < 0).sum() / (dense(f) * dense(g) != 0).sum(),
    "magnitude_overlap": dense_magnitude_overlap,
    "mask_overlap": dense_mask_overlap,
}


def test_every_measure_has_a_definition_here():
    assert set(DEFINITIONS) == set(ALL)


@pytest.mark.parametrize("pair", BANK)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_measure_is_its_dense_definition(name, pair):
    f, g = BANK[pair]
    # Singular vectors and bases turn by u times the condition number of what they come from.
    condition = max(np.linalg.cond(x.numpy()) if np.linalg.cond(x.numpy()) < 1e10 else 1 for x in (f.A, f.B, g.A, g.B))
    expected = DEFINITIONS[name](f, g)
    allowed = 1e-10 * condition * max(1.0, abs(expected))
    assert value(name, f, g) == pytest.approx(expected, abs=allowed, nan_ok=True)


@pytest.mark.parametrize("pair", BANK)
def test_the_whole_cosine_is_its_dense_definition(pair):
    """Of two modules side by side: those of the pair, and two that are ten times as large."""
    f, g = BANK[pair]
    adapters = [{"m": f, "n": factors(30, 3, 15.0)}, {"m": g, "n": factors(31, 5, 15.0)}]
    whole = [np.concatenate([dense(each).ravel() for each in own.values()]) for own in adapters]
    expected = whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    assert total_cosine(*adapters) == pytest.approx(expected, abs=1e-10)
    mean = (dense_cosine(f, g) + dense_cosine(*(own["n"] for own in adapters))) / 2
    assert total_cosine(*adapters) != pytest.approx(mean, abs=1e-3)


@given(seed=st.integers(0, 10**6), rank_f=st.integers(1, 6), rank_g=st.integers(1, 6))
def test_another_factorization_of_the_same_updates_measures_the_same(seed, rank_f, rank_g):
    """(B, A) → (B R, R⁻¹ A) leaves ΔW as it is; only the support of B is a matter of the factors."""
    f, g = factors(seed, rank_f), factors(seed + 1, rank_g)
    R = torch.linalg.qr(noise(rank_f, rank_f, seed))[0] * torch.linspace(1, 3, rank_f, dtype=torch.float64)
    other = Factors(torch.linalg.inv(R) @ f.A, f.B @ R, f.scale)
    for name in ALL:
        if name != "mask_overlap":
            assert value(name, other, g) == pytest.approx(value(name, f, g), abs=1e-8)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_another_factorization_has_the_same_curve(side):
    f, g = factors(3), factors(4, 3)
    curve = similarity_curve(reduced(f), reduced(g), side)
    turned = similarity_curve(reduced(in_another_basis(f, 1)), reduced(in_another_basis(g, 2)), side)
    assert torch.allclose(turned, curve, atol=1e-8)
    assert not torch.allclose(similarity_curve(reduced(f), reduced(factors(5, 3)), side), curve, atol=1e-2)


def test_another_factorization_has_the_same_null_but_for_zeros_of_B():
    """Draw by draw where its rows are any; of a given A the same space, in which it is turned from another basis."""
    f, g = factors(3), in_another_basis(factors(3), 1)
    one, other = (null_update(each, torch.Generator().manual_seed(5)) for each in (f, g))
    assert torch.allclose(one.delta(), other.delta(), atol=1e-8 * float(one.delta().norm()))
    assert not torch.allclose(null_update(f, torch.Generator().manual_seed(6)).delta(), one.delta(), atol=0.1)
    one, other = (null_update(each, torch.Generator().manual_seed(5), each.A) for each in (f, g))
    assert torch.allclose(spectrum(one), spectrum(other), rtol=1e-8)
    assert value("row_overlap", one, other) == pytest.approx(1, abs=1e-10)
    sparse = under_mask(40, 0.3)
    nulls = [null_update(each, torch.Generator().manual_seed(5)) for each in (sparse, in_another_basis(sparse, 1))]
    assert (nulls[0].delta() - nulls[1].delta()).norm() > 0.1 * nulls[0].delta().norm(), (
        "its zeros are in another basis"
    )


@given(seed=st.integers(0, 10**6))
def test_symmetric_measures_do_not_depend_on_the_order(seed):
    f, g = factors(seed, 3), factors(seed + 1, 5)
    for name, known in REGISTERED.items():
        if known.symmetric:
            assert value(name, f, g) == pytest.approx(value(name, g, f), abs=1e-9, nan_ok=True), name
    assert value("alignment", ONE, TWO) != pytest.approx(value("alignment", TWO, ONE), abs=1e-3)


def test_an_update_beside_itself_and_beside_one_that_is_orthogonal():
    f = factors(3)
    same = {name: value(name, f, f) for name in ALL}
    ones = ("cosine", "cosine_size", "row_overlap", "column_overlap", "alignment", "magnitude_overlap", "mask_overlap")
    zeros = ("row_grassmann", "column_grassmann", "row_chordal", "column_chordal", "sign_conflict")
    # the directions of the alignment hold 95 % of the norm, so up to that of an update beside itself
    assert {name: round(same[name], 9) for name in ones if name != "alignment"} == dict.fromkeys(
        [name for name in ones if name != "alignment"], 1
    )
    assert 0.95 <= same["alignment"] <= 1
    assert all(abs(same[name]) < 1e-7 for name in zeros) and same["singular_interference"] > 1
    basis_out, basis_in = torch.linalg.qr(noise(D_OUT, 8, 0))[0], torch.linalg.qr(f.A.T)[0]
    apart_in = torch.linalg.qr(torch.cat([basis_in, noise(D_IN, 4, 1)], 1))[0][:, 4:].T
    one, two = Factors(f.A, basis_out[:, :4] * 2, 1.0), Factors(apart_in, basis_out[:, 4:], 3.0)
    for name in ("cosine", "row_overlap", "column_overlap", "alignment", "singular_interference"):
        assert abs(value(name, one, two)) < 1e-12, name
    assert value("row_grassmann", one, two) == pytest.approx(math.sqrt(4) * math.pi / 2)
    assert value("column_chordal", one, two) == pytest.approx(math.sqrt(4))


def test_masks_overlap_by_their_supports_alone():
    mask = torch.zeros(D_OUT, 4, dtype=torch.float64)
    first, second, both = mask.clone(), mask.clone(), mask.clone()
    first[:4], second[2:8], both[:8] = 1.0, -3.0, 0.5
    A = ONE.A
    assert value("mask_overlap", Factors(A, first, 1.0), Factors(A, second, 1.0)) == 0.5
    assert value("mask_overlap", Factors(A, first, 1.0), Factors(A, both, 1.0)) == 1.0
    assert math.isnan(value("mask_overlap", Factors(A, first, 1.0), Factors(TWO.A, TWO.B, 1.0)))  # another rank


@pytest.mark.parametrize("name", ALL)
def test_what_a_zero_update_leaves_undefined_is_nan(name):
    zero = Factors(ONE.A, torch.zeros_like(ONE.B), 1.0)
    defined = {"inner_product", "singular_interference"}
    assert math.isnan(value(name, zero, ONE)) == (name not in defined)
    assert math.isnan(value(name, zero, zero)) == (name not in defined - {"singular_interference"})


# The curve of subspace similarity


@pytest.mark.parametrize("pair", BANK)
def test_the_curve_is_its_definition_on_dense_matrices(pair):
    f, g = BANK[pair]
    for side, place in (("columns", 0), ("rows", 2)):
        (left, s_f), (right, s_g) = ((each[place], each[1]) for each in map(dense_svd, map(dense, (f, g))))
        curve = similarity_curve(reduced(f), reduced(g), side).numpy()
        assert curve.shape == (len(s_f), len(s_g))
        # Leading singular vectors turn by u·s_1 over the gap that follows them.
        gap = max(s[0] / np.diff(-s).min(initial=s[-1]) for s in (s_f, s_g))
        for i in range(1, len(s_f) + 1):
            for j in range(1, len(s_g) + 1):
                expected = np.linalg.norm(left[:, :i].T @ right[:, :j]) ** 2 / min(i, j)
                assert curve[i - 1, j - 1] == pytest.approx(expected, abs=1e-12 * gap)


def test_the_curve_of_nested_spaces_is_one_and_bad_calls_are_named():
    f, g = BANK["plain"]
    itself = similarity_curve(reduced(f), reduced(f)).numpy()
    assert np.allclose(itself, 1)  # nested subspaces
    with pytest.raises(ValueError, match="side must be rows or columns; found 'left'"):
        similarity_curve(reduced(f), reduced(g), "left")


# The table


def test_a_measure_that_is_not_symmetric_stands_in_both_directions():
    table = overlap_table({"a": {"m": ONE}, "b": {"m": TWO}}, ("alignment", "cosine"))
    rows = table.set_index(["adapter_a", "adapter_b", "measure"])["value"]
    assert len(rows) == 3
    assert rows["a", "b", "alignment"] == value("alignment", ONE, TWO)
    assert rows["b", "a", "alignment"] == value("alignment", TWO, ONE)


def test_an_own_measure_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("lori_nb.analysis.overlap.REGISTERED", dict(REGISTERED))

    @measure("norm_ratio", symmetric=False)
    def norm_ratio(pair):
        return pair.f.norm / pair.g.norm

    table = overlap_table({"a": {"m": ONE}, "b": {"m": TWO}}, ("norm_ratio",))
    assert table["value"].prod() == pytest.approx(1)
    with pytest.raises(ValueError, match="measures must be among cosine, .*norm_ratio; found 'norm'"):
        overlap_table({"a": {"m": ONE}, "b": {"m": TWO}}, ("norm",))


def test_all_names_every_measure_of_the_kit():
    own = {name for name, known in REGISTERED.items() if known.value.__module__.startswith("lori_nb.")}
    assert set(ALL) == own and interference.UNDEFINED != interference.UNDEFINED


# What chance gives


@pytest.mark.parametrize("pair", ["plain", "shared A", "rank deficient", "rank above a dimension"])
def test_a_null_update_has_the_same_singular_values_and_other_directions(pair):
    f, _ = BANK[pair]
    for A in (None, f.A):
        null = null_update(f, torch.Generator().manual_seed(0), A)
        found, expected = reduced(null), reduced(f)
        assert torch.allclose(found.singular[1], expected.singular[1], rtol=1e-10)
        assert (found.columns @ found.core @ found.rows.T).shape == dense(f).shape
        assert value("cosine", null, f) < 0.9
        if A is not None:
            assert subspace_overlap(reduced(null).spaces[1], A.T) == pytest.approx(1, abs=1e-10)


def spectrum(f: Factors) -> torch.Tensor:
    return reduced(f).singular[1]


def test_a_null_update_of_a_sparse_one_keeps_its_zeros_and_its_singular_values():
    B = ONE.B * (ONE.B.abs() > 1.3)
    f = Factors(ONE.A, B, 1.5)
    assert (B == 0).double().mean() > 0.5
    for A in (None, noise(4, D_IN, 77)):
        null = null_update(f, torch.Generator().manual_seed(0), A)
        assert torch.allclose(spectrum(null), spectrum(f), rtol=1e-10)
        assert torch.equal(null.B.sort(0).values, (1.5 * B).sort(0).values) and not torch.equal(null.B, 1.5 * B)
        assert value("row_overlap", null, f) < 0.6
        if A is not None:
            assert value("row_overlap", null, Factors(A, f.B, 1.0)) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(
    "A",
    [noise(30, D_IN, 50), torch.cat([noise(4, D_IN, 51)] * 2)],
    ids=["rank above a dimension", "rank deficient"],
)
def test_a_sparse_update_of_any_rank_has_a_null(A):
    B = noise(D_OUT, len(A), 52)
    f = Factors(A, B * (B.abs() > 1.3), 1.5)
    assert (f.B == 0).double().mean() > 0.5
    for own in (None, A):
        null = null_update(f, torch.Generator().manual_seed(0), own)
        assert torch.allclose(spectrum(null), spectrum(f), rtol=1e-10)
        assert torch.equal(null.B.sort(0).values, (1.5 * f.B[:, f.B.any(0)]).sort(0).values)
        assert value("cosine", null, f) < 0.9


def test_one_zero_or_padded_ranks_do_not_change_the_null():
    f, one_zero = ONE, Factors(ONE.A, ONE.B.clone(), ONE.scale)
    one_zero.B[0, 0] = 0
    padded = Factors(torch.cat([f.A, noise(4, D_IN, 5)]), torch.cat([f.B, torch.zeros(D_OUT, 4).double()], 1), f.scale)
    null = {name: null_update(each, torch.Generator().manual_seed(0)) for name, each in
            {"plain": f, "one zero": one_zero, "padded": padded}.items()}  # fmt: skip
    assert torch.allclose(null["plain"].delta(), null["padded"].delta(), atol=1e-12)
    assert spectrum(null["one zero"]).shape == (4,) and (null["one zero"].B != 0).all()


def under_mask(seed: int, density: float, rows: int = 60) -> Factors:
    """An update whose B is zero outside of a random mask."""
    mask = torch.rand(rows, 5, generator=torch.Generator().manual_seed(seed)) < density
    return Factors(noise(5, D_IN, seed), noise(rows, 5, seed + 1) * mask, 1.0)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_masks_overlap_by_chance_as_their_density_says(density):
    """Rows in random places: column by column Σ n_f n_g / d_out entries meet; of independent masks the density."""
    adapters = {name: {"m": under_mask(40 + 2 * place, density)} for place, name in enumerate("abc")}
    draws = null_draws(adapters, 24, measures=("mask_overlap",))
    for (a, b), part in draws.groupby(["adapter_a", "adapter_b"]):
        f, g = (adapters[name]["m"].B != 0 for name in (a, b))
        expected_share = float((f.sum(0) * g.sum(0)).sum() / len(f) / min(f.sum(), g.sum()))
        assert expected_share == pytest.approx(max(float(m.double().mean()) for m in (f, g)), abs=0.03)
        # 24 draws of some 300 · density entries: five standard errors, of a share with at most √(¼ / n) each
        reach = 5 * (0.25 / int(min(f.sum(), g.sum())) / 24) ** 0.5
        assert part["value"].mean() == pytest.approx(expected_share, abs=reach) and reach < 0.06
        assert part["value"].nunique() > 1 and part["value"].max() < 1


def test_the_null_of_a_mask_leaves_every_other_draw_as_it_is():
    """Those of other measures, and of other adapters, are those of an update without zeros and the same spectrum."""
    f = under_mask(40, 0.7)
    (U, singular, V), other = reduced(f).singular, under_mask(42, 0.3)
    dense_one = Factors(V.T, U * singular, 1.0)
    assert not (dense_one.B == 0).any()
    masked, plain = (
        null_set({"f": {"m": each}, "g": {"m": other}}, torch.Generator().manual_seed(3)) for each in (f, dense_one)
    )
    assert torch.equal(masked["g"]["m"].B, plain["g"]["m"].B) and torch.equal(masked["g"]["m"].A, plain["g"]["m"].A)
    assert torch.equal(masked["f"]["m"].A, plain["f"]["m"].A)
    assert torch.allclose(masked["f"]["m"].B, plain["f"]["m"].B, rtol=1e-10)
    assert reduced(plain["f"]["m"]).support.all() and not reduced(masked["f"]["m"]).support.all()


def nulls_of(adapters, draws=4, **more) -> pd.Series:
    table = null_draws(adapters, draws, **more)
    return expected(table, ["adapter_a", "adapter_b", "measure"]).groupby("measure")["null"].mean()


def test_the_null_of_a_shared_A_is_shared_rows():
    """Overlap of rows is 1 under a shared draw, trained or not; independent draws give about r / d_in."""
    shared = random_down_projection(0, "shared", "m", 4, 400)
    adapters = {name: {"m": Factors(shared, noise(50, 4, place), 2.0)} for place, name in enumerate("abc")}
    under = nulls_of(adapters, A={name: {"m": shared} for name in adapters})
    apart = nulls_of(adapters)
    assert under["row_overlap"] == pytest.approx(1, abs=1e-9) and apart["row_overlap"] < 0.05
    assert under["column_overlap"] < 0.3 and apart["column_overlap"] < 0.3


def test_null_draws_are_seeded_and_cover_the_pairs_of_the_table():
    adapters = {"a": {"m": ONE, "n": factors(9)}, "b": {"m": TWO}, "c": {"m": factors(11), "n": factors(12)}}
    draws, table = null_draws(adapters, 6, 3, ALL), overlap_table(adapters, ALL)
    assert draws[draws["draw"] == 0][table.columns[:4]].reset_index(drop=True).equals(table[table.columns[:4]])
    found, pairs = by_pair(table, norms(adapters)), by_pair(draws, norms(adapters), ["draw"])
    keys = ["adapter_a", "adapter_b", "measure"]
    first = pairs.loc[pairs["draw"] == 0, keys].sort_values(keys, ignore_index=True)
    assert first.equals(found[keys].sort_values(keys, ignore_index=True)) and len(pairs) == 6 * len(found)
    again, other = null_draws(adapters, 6, 3, ALL), null_draws(adapters, 6, 4, ALL)
    assert draws.equals(again) and not draws.equals(other)
    with pytest.raises(ValueError, match="draws must be at least 1; found 0"):
        null_draws(adapters, 0)


def test_pairs_have_the_cosine_of_the_whole_updates_once_and_only_where_they_meet():
    adapters = {"a": {"m": ONE, "n": factors(9)}, "b": {"m": TWO, "n": factors(10)}, "c": {"o": factors(11)}}
    found = by_pair(overlap_table(adapters, ("inner_product", "alignment")), norms(adapters))
    (total,) = found[found["measure"] == TOTAL].to_dict("records")
    (inner,) = found[found["measure"] == "inner_product"].to_dict("records")
    whole = [np.concatenate([dense(adapters[name][m]).ravel() for m in "mn"]) for name in "ab"]
    assert inner["value"] == pytest.approx(whole[0] @ whole[1])
    assert total["value"] == pytest.approx(whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1]))
    assert total["value"] == pytest.approx(total_cosine(adapters["a"], adapters["b"]))
    assert (total["adapter_a"], total["adapter_b"]) == ("a", "b")
    assert len(found[found["measure"] == "alignment"]) == 2


def with_empty_columns(seed: int, width: int, rows: int = 70) -> Factors:
    """Rank 6, of which B holds the first ``width`` columns."""
    kept = torch.arange(6) < width
    return Factors(noise(6, 90, seed), noise(rows, 6, seed + 1) * kept, 1.0)


def test_an_empty_column_of_B_counts_in_a_value_no_more_than_in_its_null():
    """Rows of A that no entry of ΔW holds are not read: by the row space of all of A, the overlap were 6 / 90."""
    f, g = with_empty_columns(0, 2), with_empty_columns(2, 6)
    whole = reduced(Factors(f.A, noise(70, 6, 9), 1.0))
    found = Pair(reduced(f), reduced(g))
    assert len(found.row_angles) == len(found.column_angles) == 2
    assert len(Pair(whole, reduced(g)).row_angles) == 6
    null = null_set({"f": {"m": f}, "g": {"m": g}}, torch.Generator().manual_seed(0))
    random = Pair(*(reduced(each["m"]) for each in null.values()))
    assert len(random.row_angles) == len(random.column_angles) == 2
    # the overlap of masks sees the whole B on both sides: a third of one lies in the other, by rows in any order
    assert value("mask_overlap", f, g) == value("mask_overlap", null["f"]["m"], null["g"]["m"]) == 1.0


def deficient(seed: int, width: int, rows: int = 70) -> Factors:
    """B of rank ``width`` in six columns, before an A that belongs to the width: the module."""
    A = torch.linalg.qr(noise(90, 6, 500 + width))[0].T
    return Factors(A, noise(rows, width, seed) @ noise(width, 6, seed + 1), 1.0)


@pytest.mark.parametrize(("of", "shared"), [(with_empty_columns, False), (deficient, True)], ids=["apart", "one A"])
def test_random_adapters_of_deficient_ranks_and_zero_modules_lie_inside_their_null(of, shared):
    """What a mask may leave of a module: a few columns, or nothing. 95 % limits; a fifth may miss them by chance."""
    adapters = {
        name: {f"layers.{n}.q": of(20 * place + 2 * n, n) for n in range(7)} for place, name in enumerate("abcd")
    }
    A = {name: {m: f.A for m, f in own.items()} for name, own in adapters.items()} if shared else None
    names = [name for name in ALL if name != "mask_overlap"]  # the same in every draw: B has no zeros but whole columns
    table, draws = where_defined(overlap_table(adapters, names), null_draws(adapters, 24, measures=names, A=A))
    keys, sizes = ["adapter_a", "adapter_b", "measure"], norms(adapters)
    pairs = by_pair(table, sizes).merge(expected(by_pair(draws, sizes, ["draw"]), keys), on=keys)
    assert set(pairs["measure"]) == {*names, TOTAL} and pairs["value"].notna().all()
    slack = 1e-9  # for a shared A of which all rows are read, both are the same but for rounding
    inside = (pairs["null_low"] - slack <= pairs["value"]) & (pairs["value"] <= pairs["null_high"] + slack)
    assert inside.groupby(pairs["measure"]).mean().min() >= 0.5 and inside.mean() >= 0.8
    # what all rows of A give, whatever ΔW holds of them, lies outside
    whole = np.mean([subspace_overlap(f.A.T, adapters["b"][m].A.T) for m, f in adapters["a"].items()])
    limits = pairs.set_index(keys).loc[("a", "b", "row_overlap")]
    assert whole > limits["null_high"] and limits["value"] <= limits["null_high"]


def test_means_of_a_value_and_its_null_are_over_the_same_modules():
    keys = {"adapter_a": "a", "adapter_b": "b", "measure": "cosine"}
    table = pd.DataFrame([keys | {"module": m, "value": v} for m, v in {"x": 1.0, "y": 3.0, "z": math.nan}.items()])
    null = {("x", 0): 5.0, ("x", 1): 5.0, ("y", 0): 7.0, ("y", 1): math.nan, ("z", 0): 9.0, ("z", 1): 9.0}
    draws = pd.DataFrame([keys | {"module": m, "draw": d, "value": v} for (m, d), v in null.items()])
    values, chance = where_defined(table, draws)
    assert values["value"].mean() == 1.0 and chance["value"].mean() == 5.0
    assert table["value"].mean() == 2.0 and draws["value"].mean() == 7.0


def test_limits_of_the_null_hold_95_percent_of_further_draws():
    """mean ± t s √(1 + 1/n) for Gaussian draws: 95 %, with a standard error of 0.5 % over 2,000 trials."""
    trials = noise(2000, 9, 8).numpy()
    draws = pd.DataFrame({"trial": np.repeat(np.arange(2000), 8), "value": trials[:, :8].ravel()})
    limits = expected(draws, ["trial"])
    inside = (limits["null_low"] <= trials[:, 8]) & (trials[:, 8] <= limits["null_high"])
    assert inside.mean() == pytest.approx(0.95, abs=0.02)
    assert np.isnan(expected(draws[:1], ["trial"])["null_low"][0])


def test_sign_conflict_of_noise_is_a_half_and_large_entries_meet_by_chance():
    adapters = {name: {"m": Factors(noise(8, 60, seed), noise(60, 8, seed + 2), 1.0)} for seed, name in enumerate("ab")}
    null = nulls_of(adapters, 12, measures=("sign_conflict", "magnitude_overlap"))
    # 12 draws of 3,600 entries that hang together in rank-8 updates: a few hundredths
    assert null["sign_conflict"] == pytest.approx(0.5, abs=0.05)
    assert 0.15 < null["magnitude_overlap"] < 0.35


def test_zeros_are_never_large():
    first, second = torch.zeros(D_OUT, 4).double(), torch.zeros(D_OUT, 4).double()
    first[0], second[1] = 1.0, 1.0
    assert value("magnitude_overlap", Factors(ONE.A, first, 1.0), Factors(ONE.A, second, 1.0)) == 0.0
    assert value("magnitude_overlap", Factors(ONE.A, first, 1.0), Factors(ONE.A, 2 * first, 1.0)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_that_rounding_made_do_not_count(dtype):
    """A rank-2 B of 6 columns, stored in less than float64: the other four directions are rounding."""
    exact = noise(200, 2, 0) @ noise(2, 6, 1)
    stored = Factors(noise(6, 300, 2).to(dtype), exact.to(dtype), 1.0)
    found = reduced(stored)
    assert (found.written, found.read) == (2, 6) and len(found.singular[1]) == 2
    assert len(Pair(found, found).column_angles) == len(Pair(found, found).row_angles) == 2
    assert reduced(Factors(stored.A.double(), stored.B.double(), 1.0)).written == 6
    assert found.norm == pytest.approx(np.linalg.norm(dense(Factors(stored.A.double(), stored.B.double(), 1.0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_directions_that_training_made_count_in_every_dtype(dtype):
    """A trained B's singular values fall by a decade or two; that is far more than rounding can make."""
    left, right = torch.linalg.qr(noise(2000, 16, 3))[0], torch.linalg.qr(noise(16, 16, 4))[0]
    B = left * torch.logspace(0, -1.5, 16, dtype=torch.float64) @ right
    stored = [Factors(noise(16, 300, 5 + n).to(dtype), B.roll(n, 0).to(dtype), 1.0) for n in range(2)]
    found = [reduced(f) for f in stored]
    assert {(each.written, each.read, len(each.singular[1])) for each in found} == {(16, 16, 16)}
    one, two = (dense(Factors(f.A.double(), f.B.double(), 1.0)) for f in stored)
    expected = np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two)
    assert REGISTERED["cosine"].value(Pair(*found)) == pytest.approx(expected, abs=1e-10)
