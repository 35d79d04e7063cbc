"""Merges of entries against their definitions, entry by entry, and what the seeds of DARE decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_cases import hard_bank, weights_of
from hypothesis import given
from hypothesis import strategies as st

from lori_nb.analysis.elementwise_merging import FULL_RANK, dare, dare_ties, magnitude, ties_of_updates
from lori_nb.analysis.merging import MERGE_METHODS, merge, merge_method
from lori_nb.method.adapters import Factors

METHODS = ("magnitude", "ties", "dare", "dare-ties")
SHAPES = [(14, 11), (7, 12), (9, 9)]


def noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, shape=(14, 11), rank: int = 3, scale: float = 1.5) -> Factors:
    return Factors(noise(rank, shape[1], 2 * seed), noise(shape[0], rank, 2 * seed + 1), scale)


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.B.double() @ f.A.double()).numpy()


def literal_largest(X: np.ndarray, density: float) -> np.ndarray:
    order = sorted(np.ndindex(X.shape), key=lambda place: -abs(X[place]))
    kept = np.zeros_like(X)
    for place in order[: int(np.ceil(density * X.size))]:
        kept[place] = X[place]
    return kept


def literal_election(updates: list[np.ndarray], weights: list[float]) -> np.ndarray:
    merged = np.zeros_like(updates[0])
    for place in np.ndindex(merged.shape):
        votes = [w * X[place] for w, X in zip(weights, updates, strict=True)]
        agreeing = [vote for vote in votes if vote and np.sign(vote) == np.sign(sum(votes))]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), density=st.sampled_from([0.1, 0.3, 1.0]))
def test_magnitude_and_ties_are_their_literal_definitions(seed, shape, density):
    weights, own = [0.7, -0.4, 1.3], [factors(seed + n, shape, 2 + n, (-1) ** n * 0.5) for n in range(3)]
    kept = [literal_largest(dense(f), density) for f in own]
    found = magnitude(own, weights, density)
    assert np.allclose(dense(found), sum(w * X for w, X in zip(weights, kept, strict=True)), atol=1e-12)
    found = ties_of_updates(own, weights, density)
    assert np.allclose(dense(found), literal_election(kept, weights), atol=1e-12)


@pytest.mark.parametrize("case", hard_bank())
def test_over_hard_cases_they_are_their_literal_definitions(case):
    own = hard_bank()[case]
    weights, count = weights_of(own), len(own)
    largest = [literal_largest(dense(f), 0.2) for f in own]
    kept = [dense(dare(own, [float(n == place) for n in range(count)], seed=3)) for place in range(count)]
    for f, part in zip(own, kept, strict=True):  # what DARE keeps, it makes larger; the rest is zero
        assert np.allclose(part[part != 0], dense(f)[part != 0] / 0.2, rtol=1e-12, atol=0)
        assert (part != 0).sum() < (dense(f) != 0).sum() or not dense(f).any()
    summed = {"magnitude": largest, "dare": kept}
    expected = {name: sum(w * X for w, X in zip(weights, parts, strict=True)) for name, parts in summed.items()}
    expected |= {"ties": literal_election(largest, weights), "dare-ties": literal_election(kept, weights)}
    for name, wanted in expected.items():
        options = {"seed": 3} if "dare" in name else {}
        found = dense(MERGE_METHODS[name](own, weights, **options))
        assert np.allclose(found, wanted, rtol=0, atol=1e-12 * max(1.0, np.abs(wanted).max())), name


def test_at_full_density_magnitude_is_the_exact_sum_and_ties_is_not():
    own, weights = [factors(1), factors(2)], [0.5, 0.25]
    exact = 0.5 * dense(own[0]) + 0.25 * dense(own[1])
    assert np.allclose(dense(magnitude(own, weights, 1.0)), exact)
    assert not np.allclose(dense(ties_of_updates(own, weights, 1.0)), exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_drops_entries_at_its_rate_and_scales_the_rest(shape):
    f = factors(3, shape)
    found = dense(dare([f], [2.0], density=0.25, seed=5))
    kept = found != 0
    assert np.allclose(found[kept], 2.0 * dense(f)[kept] / 0.25)
    draws = [dense(dare([f], [1.0], density=0.25, seed=seed)) for seed in range(200)]
    # The mean over n draws has the standard error |ΔW| √((1 − p)/p / n) = 0.12 |ΔW|; six of them bound 154 entries.
    assert (np.abs(np.mean(draws, axis=0) - dense(f)) <= 6 * np.sqrt(3 / 200) * np.abs(dense(f))).all()
    assert np.allclose(dense(dare([f], [1.0], density=1.0)), dense(f))


def test_dare_ties_elects_among_the_entries_that_dare_keeps():
    own, weights = [factors(1), factors(2), factors(3)], [1.0, 0.5, -0.7]
    alone = [dense(dare([f], [1.0], seed=4)) for f in own[:1]]
    kept = [dense(dare(own, [float(n == place) for n in range(3)], seed=4)) for place in range(3)]
    assert np.allclose(alone[0], kept[0])  # the first adapter's draw is that of a merge of it alone
    assert np.allclose(dense(dare_ties(own, weights, seed=4)), literal_election(kept, weights), atol=1e-12)


def test_the_seed_the_module_and_the_place_decide_what_dare_drops():
    one, two = factors(1), factors(2)
    zeros = {
        "as it is": dense(dare([one], [1.0], module="q")) == 0,
        "again": dense(dare([one], [1.0], module="q")) == 0,
        "other factors": dense(dare([two], [1.0], module="q")) == 0,
        "other seed": dense(dare([one], [1.0], seed=1, module="q")) == 0,
        "other module": dense(dare([one], [1.0], module="v")) == 0,
        "second place": dense(dare([one, one], [0.0, 1.0], module="q")) == 0,
    }
    for name in ("again", "other factors"):
        assert (zeros["as it is"] == zeros[name]).all(), name
    for name in ("other seed", "other module", "second place"):
        assert (zeros["as it is"] != zeros[name]).any(), name
    order, reverse = dare([one, two], [1.0, 1.0]), dare([two, one], [1.0, 1.0])
    assert not np.allclose(dense(order), dense(reverse))


@pytest.mark.parametrize("name", ["magnitude", "ties"])
def test_order_does_not_matter_where_nothing_is_drawn(name):
    own, weights = [factors(1), factors(2), factors(3)], [0.7, -0.4, 1.3]
    there, back = MERGE_METHODS[name](own, weights), MERGE_METHODS[name](own[::-1], weights[::-1])
    assert np.allclose(dense(there), dense(back), atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_results_are_exact_factors_of_the_smaller_dimension(name, shape):
    f = factors(1, shape)
    single = Factors(f.A.float(), f.B.float(), f.scale)
    found = MERGE_METHODS[name]([single, single], [1.0, 1.0])
    assert found.A.dtype == found.B.dtype == torch.float32 and found.scale == 1.0
    assert len(found.A) == min(shape) and found.delta().shape == shape


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_update_adds_nothing_and_no_division_by_zero(name):
    zero = Factors(noise(2, 11, 1), torch.zeros(14, 2, dtype=torch.float64), 1.0)
    assert not dense(MERGE_METHODS[name]([zero, zero], [1.0, 1.0])).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: magnitude([factors(1)], [1.0], 0.0), r"density must be in \(0, 1\]; found 0.0"),
        (lambda: dare([factors(1)], [1.0], density=1.5), r"density must be in \(0, 1\]; found 1.5"),
        (
            lambda: merge([{"m": factors(1)}], [1.0], "ties", options={"keep": 0.5}),
            "options of method 'ties' must be among density; found 'keep'",
        ),
        (
            lambda: merge([{"m": factors(1)}], [1.0], options={"density": 0.5}),
            "options of method 'cat' must be among none; found 'density'",
        ),
        (lambda: merge([{"m": factors(1)}], [1.0], rank="all"), "rank must be at least 1; found 'all'"),
        (lambda: merge([{"m": factors(1)}], [1.0], rank=0), "rank must be at least 1; found 0"),
        (lambda: merge([{"m": factors(1)}], [{"n": 1.0}]), "name every module of their adapter; missing: m"),
        (lambda: merge([{"m": factors(1)}], [{"m": float("nan")}]), "weights must be 1 finite numbers"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_rank_cuts_every_module_to_its_nearest_update_of_that_rank():
    own = [{"m": factors(1), "n": factors(2, (7, 12))}, {"m": factors(3)}]
    whole, cut = merge(own, [1.0, 0.5], "ties"), merge(own, [1.0, 0.5], "ties", rank=2)
    for module, f in whole.items():
        U, values, Vh = np.linalg.svd(dense(f))
        nearest = (U[:, :2] * values[:2]) @ Vh[:2]
        assert len(cut[module].A) == 2 and np.allclose(dense(cut[module]), nearest, atol=1e-10)


def test_weights_may_differ_by_module():
    own = [{"m": factors(1), "n": factors(2)}, {"m": factors(3)}]
    found = merge(own, [{"m": 0.5, "n": -1.0}, 0.25])
    assert np.allclose(dense(found["m"]), 0.5 * dense(own[0]["m"]) + 0.25 * dense(own[1]["m"]))
    assert np.allclose(dense(found["n"]), -dense(own[0]["n"]))


def test_other_options_are_an_own_method(monkeypatch):
    monkeypatch.setattr("lori_nb.analysis.merging.MERGE_METHODS", dict(MERGE_METHODS))

    @merge_method("dare-half")
    def dare_half(factors, weights, module):
        return dare(factors, weights, density=0.5, seed=7, module=module)

    own = [{"m": factors(1)}, {"m": factors(2)}]
    found = merge(own, [1.0, 1.0], "dare-half")["m"]
    assert 0.6 < (dense(found) != 0).mean() < 0.9  # 1 − 0.5² of the entries are in one of the two
    chosen = merge(own, [1.0, 1.0], "dare", options={"density": 0.5, "seed": 7})["m"]
    assert np.array_equal(dense(found), dense(chosen))
    for other in ({"density": 0.5}, {"seed": 7}):
        assert not np.array_equal(dense(found), dense(merge(own, [1.0, 1.0], "dare", options=other)["m"]))


def test_modules_of_equal_factors_have_draws_of_their_own():
    """By the module's name: with the factors' bits as seed, modules that start alike would share them."""
    own = [{"q": factors(1), "v": factors(1)}]
    found = merge(own, [1.0], "dare")
    assert not np.array_equal(dense(found["q"]), dense(found["v"]))
    assert np.array_equal(dense(found["q"]), dense(dare([factors(1)], [1.0], module="q")))


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_of_every_method_the_sum_of_ranks_cuts_what_has_more(name):
    """Of those on entries alone, module by module; what has no more keeps its bits."""
    own = [{"m": factors(1, (14, 11), 3), "n": factors(2, (7, 12), 3)}, {"m": factors(3, (14, 11), 3)}]
    whole, cut = merge(own, [1.0, 0.5], name), merge(own, [1.0, 0.5], name, rank="sum")
    for module, most in {"m": 6, "n": 3}.items():
        if name in FULL_RANK:
            assert len(whole[module].A) == min(whole[module].delta().shape) > most == len(cut[module].A)
            U, values, Vh = np.linalg.svd(dense(whole[module]))
            assert np.allclose(dense(cut[module]), (U[:, :most] * values[:most]) @ Vh[:most], atol=1e-10)
        else:
            assert len(whole[module].A) <= most
            assert torch.equal(whole[module].A, cut[module].A) and torch.equal(whole[module].B, cut[module].B)
