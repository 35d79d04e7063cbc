"""Masks: exactly k entries a group, the largest ones, the same on every run; packing loses nothing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import gaussian

from lori_nb.method.masks import (
    SCOPES,
    STRUCTURES,
    capacity,
    group_of,
    kept,
    kept_in_all,
    kept_of,
    magnitude_masks,
    mask_bits,
    mask_from_bits,
    pack,
    random_masks,
    unpack,
)

NAME = "model.layers.22.self_attn.q_proj"
SHAPES = {
    "model.layers.1.self_attn.q_proj": (6, 2),
    "model.layers.1.self_attn.v_proj": (3, 2),
    "model.layers.1.mlp.up_proj": (9, 2),
    "model.layers.2.self_attn.q_proj": (6, 2),
    "model.layers.10.mlp.up_proj": (5, 3),
}


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sizes_by_group(scope: str, masks: dict[str, torch.Tensor] | None = None) -> dict[str, int]:
    """Entries of each group, or kept entries where masks are given."""
    sizes: dict[str, int] = {}
    for name, (rows, columns) in SHAPES.items():
        size = rows * columns if masks is None else int(masks[name].sum())
        sizes[group_of(name, scope)] = sizes.get(group_of(name, scope), 0) + size
    return sizes


@pytest.mark.parametrize(
    ("scope", "group"),
    [
        ("model", ""),
        ("layer", "model.layers.22"),
        ("projection", "q_proj"),
        ("module", "model.layers.22.self_attn"),
        ("matrix", NAME),
    ],
)
def test_group_of_every_scope(scope, group):
    assert group_of(NAME, scope) == group


def test_layers_of_encoder_and_decoder_are_apart_and_bert_names_work():
    assert group_of("encoder.layer.3.attention.self.query", "layer") == "encoder.layer.3"
    assert group_of("encoder.block.3.q", "layer") != group_of("decoder.block.3.q", "layer")


@given(
    seed=st.integers(0, 99),
    sparsity=st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    scope=st.sampled_from(sorted(SCOPES)),
    kind=st.sampled_from(["random", "zero", "equal", "few values"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_exactly_k_of_the_largest_in_every_group(seed, sparsity, scope, kind):
    make = {
        "random": lambda B: B,
        "zero": torch.zeros_like,
        "equal": lambda B: torch.full_like(B, -0.5),
        "few values": lambda B: B.round(),
    }
    Bs = {name: make[kind](B) for name, B in draw(seed).items()}
    masks = magnitude_masks(Bs, sparsity, scope)
    assert sizes_by_group(scope, masks) == {g: kept_of(n, sparsity) for g, n in sizes_by_group(scope).items()}
    for group in sizes_by_group(scope):
        names = [name for name in SHAPES if group_of(name, scope) == group]
        inside = torch.cat([Bs[name][masks[name]].abs() for name in names])
        outside = torch.cat([Bs[name][~masks[name]].abs() for name in names])
        if len(inside) and len(outside):
            assert inside.min() >= outside.max()


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_equals_a_stable_sort_by_magnitude_then_position(scope):
    Bs = {name: (2 * B).round() for name, B in draw(3).items()}  # many ties
    masks = magnitude_masks(Bs, 0.6, scope)
    for group, size in sizes_by_group(scope).items():
        entries = [
            (-abs(float(value)), name, index)
            for name in SHAPES
            if group_of(name, scope) == group
            for index, value in enumerate(Bs[name].reshape(-1))
        ]
        expected = {(name, index) for _, name, index in sorted(entries)[: kept_of(size, 0.6)]}
        found = {
            (name, index)
            for name in SHAPES
            if group_of(name, scope) == group
            for index in masks[name].reshape(-1).nonzero()[:, 0].tolist()
        }
        assert found == expected


def test_ties_go_to_the_earlier_position_whatever_the_mapping_order():
    Bs = {"b": torch.ones(2, 2), "a": torch.ones(2, 2)}
    masks = magnitude_masks(Bs, 0.25)
    assert masks["a"].all()
    assert masks["b"].tolist() == [[True, True], [False, False]]
    again = magnitude_masks(dict(reversed(Bs.items())), 0.25)
    assert all(torch.equal(masks[name], again[name]) for name in Bs)


def test_scopes_differ_where_magnitudes_do():
    Bs = {"layers.0.q_proj": torch.full((4, 5), 9.0), "layers.1.q_proj": torch.ones(4, 5)}
    model, matrix = magnitude_masks(Bs, 0.5, "model"), magnitude_masks(Bs, 0.5, "matrix")
    assert [int(model[name].sum()) for name in Bs] == [20, 0]
    assert [int(matrix[name].sum()) for name in Bs] == [10, 10]


def test_k_rounds_half_up_on_the_decimal_as_written():
    assert kept_of(25, 0.9) == 3  # 2.5 exactly; (1 - 0.9) * 25 in floats is 2.4999999999999996
    assert kept_of(24, 0.9) == 2
    assert kept_of(44_040_192, 0.9) == 4_404_019  # LoRI-S on Llama-3-8B, r = 32
    assert kept_of(7, 0) == 7


@settings(derandomize=True)
@given(entries=st.integers(0, 10**9), tenths=st.integers(0, 9))
def test_k_is_within_half_an_entry_of_the_share(entries, tenths):
    off = kept_of(entries, tenths / 10) - Fraction(10 - tenths, 10) * entries
    assert Fraction(-1, 2) < off <= Fraction(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_type_is_selected_by_its_own_values(dtype):
    B = torch.tensor([[1.0, -4.0], [3.0, 2.0]], dtype=dtype)
    assert magnitude_masks({"m": B}, 0.5)["m"].tolist() == [[False, True], [True, False]]


def test_doubles_closer_than_float32_can_tell_are_told_apart():
    B = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert magnitude_masks({"m": B}, 0.5)["m"].tolist() == [[False, True]]


def test_inputs_are_not_altered():
    Bs = draw(0)
    before = {name: B.clone() for name, B in Bs.items()}
    magnitude_masks(Bs, 0.9)
    assert all(torch.equal(Bs[name], before[name]) for name in Bs)


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_random_masks_keep_exactly_k_and_repeat(scope):
    masks = random_masks(SHAPES, 0.7, scope, seed=5)
    assert sizes_by_group(scope, masks) == {g: kept_of(n, 0.7) for g, n in sizes_by_group(scope).items()}
    again = random_masks(dict(reversed(SHAPES.items())), 0.7, scope, seed=5)
    other = random_masks(SHAPES, 0.7, scope, seed=6)
    assert all(torch.equal(masks[name], again[name]) for name in SHAPES)
    assert any(not torch.equal(masks[name], other[name]) for name in SHAPES)


def test_random_masks_are_pinned_on_every_platform():
    mask = random_masks({NAME: (4, 4)}, 0.5, seed=0)[NAME]
    assert mask_bits(mask).tolist() == [60, 54]


def test_random_masks_of_a_matrix_do_not_depend_on_its_company():
    alone = random_masks({NAME: (8, 4)}, 0.5, "matrix", seed=1)[NAME]
    among = random_masks({NAME: (8, 4), "layers.0.other": (8, 4)}, 0.5, "matrix", seed=1)
    assert torch.equal(among[NAME], alone)
    assert not torch.equal(among["layers.0.other"], alone)


def test_random_masks_are_uniform():
    # 400 masks keeping 2 of 16: each entry's count is binomial(400, 1/8), sd 6.6; 5 sd bounds 16 entries at p < 1e-5.
    counts = sum(random_masks({"m": (4, 4)}, 0.875, seed=s)["m"].int() for s in range(400))
    assert (counts - 50).abs().max() < 5 * np.sqrt(400 * (1 / 8) * (7 / 8))


def test_random_masks_of_two_streams_differ():
    one, two = (random_masks(SHAPES, 0.7, seed=5, stream=stream) for stream in ("rte", "boolq"))
    assert kept(one) == kept(two)
    assert any(not torch.equal(one[name], two[name]) for name in SHAPES)


# Whole rows


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("kind", ["normal", "zero", "equal"])
def test_row_masks_keep_whole_rows_of_largest_norm(scope, kind):
    Bs = {"normal": draw(3), "zero": {n: torch.zeros(s) for n, s in SHAPES.items()}}
    Bs["equal"] = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    masks = magnitude_masks(Bs[kind], 0.6, scope, "rows")
    groups: dict[str, list[str]] = {}
    for name in sorted(SHAPES):
        groups.setdefault(group_of(name, scope), []).append(name)
    for names in groups.values():
        norms = torch.cat([Bs[kind][name].double().norm(dim=1) for name in names])
        rows = torch.cat([masks[name].any(dim=1) for name in names])
        assert rows.sum() == kept_of(len(rows), 0.6)
        assert not rows.any() or rows.all() or norms[rows].min() >= norms[~rows].max()
    assert all(torch.equal(mask.all(dim=1), mask.any(dim=1)) for mask in masks.values())


def test_random_row_masks_keep_whole_rows_and_as_many():
    masks = random_masks(SHAPES, 0.6, structure="rows", seed=1)
    rows = torch.cat([mask.any(dim=1) for mask in masks.values()])
    assert rows.sum() == kept_of(len(rows), 0.6)
    assert all(torch.equal(mask.all(dim=1), mask.any(dim=1)) for mask in masks.values())


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_how_many_are_kept_is_known_beforehand(scope):
    same_rank = {name: shape for name, shape in SHAPES.items() if shape[1] == 2}
    Bs = {name: draw(1)[name] for name in same_rank}
    for structure in ("entries", "rows"):
        found = kept(magnitude_masks(Bs, 0.7, scope, structure))
        assert kept_in_all(same_rank, 0.7, scope, structure) == found
    assert kept_in_all(SHAPES, 0.7, scope) == kept(magnitude_masks(draw(1), 0.7, scope))
    with pytest.raises(ValueError, match="modules must have one rank for masks of rows"):
        kept_in_all(SHAPES, 0.7, scope, "rows")


def test_an_unknown_structure():
    for call in (
        lambda: magnitude_masks(draw(0), 0.5, structure="row"),
        lambda: random_masks(SHAPES, 0.5, "model", "", seed=0),
    ):
        with pytest.raises(ValueError, match="mask_structure must be one of entries, rows; found"):
            call()


# Packing


@given(seed=st.integers(0, 99), sparsity=st.sampled_from([0.0, 0.3, 0.9, 0.99]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_packing_and_bits_round_trip(seed, sparsity):
    B = draw(seed)["model.layers.10.mlp.up_proj"]
    mask = magnitude_masks({"m": B}, sparsity)["m"]
    assert torch.equal(unpack(pack(B, mask), mask), B * mask)
    assert torch.equal(mask_from_bits(mask_bits(mask), mask.shape), mask)
    assert len(pack(B, mask)) == kept({"m": mask}) == int(mask.sum())
    assert mask_bits(mask).shape == (2,)  # 15 entries in 2 bytes


def test_the_first_entry_is_the_highest_bit():
    mask = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
    assert mask_bits(mask).tolist() == [0b1000_0001, 0b1000_0000]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be at least 0 and below 1 \(the share of zeros\); found"):
        magnitude_masks(draw(0), sparsity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_B_that_is_not_finite_is_named(bad):
    Bs = draw(0)
    Bs["model.layers.1.mlp.up_proj"][0, 0] = bad
    with pytest.raises(ValueError, match=r"found NaN or infinity in 'model.layers.1.mlp.up_proj'"):
        magnitude_masks(Bs, 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: magnitude_masks({"m": torch.ones(1, 1)}, 0.5, "rank"), "scope must be one of model, layer, .*'rank'"),
        (lambda: magnitude_masks({}, 0.5), "at least one module; found none"),
        (lambda: magnitude_masks({"lm_head": torch.ones(1, 1)}, 0.5, "layer"), "needs a layer number .* 'lm_head'"),
        (lambda: pack(torch.ones(2, 2), torch.ones(2, 2)), "mask must be a bool tensor; found torch.float32"),
        (lambda: pack(torch.ones(2, 2), torch.ones(4, dtype=torch.bool)), r"shape of B \(2, 2\); found \(4,\)"),
        (lambda: unpack(torch.ones(3), torch.ones(2, dtype=torch.bool)), r"shape \(2,\).*found \(3,\)"),
        (lambda: mask_from_bits(torch.zeros(2, dtype=torch.uint8), (2, 4)), r"uint8 of shape \(1,\).*\(2,\)"),
        (lambda: mask_from_bits(torch.tensor([1], dtype=torch.uint8), (7,)), "found a padding bit that is set"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Disjoint masks


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_disjoint_masks_are_the_largest_of_the_free_entries(scope, structure):
    """One task after another until none fits, against sorting the free entries (or rows) of every group."""
    names = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.mlp.up_proj")
    Bs = {name: gaussian(8, 4, seed=seed) for seed, name in enumerate(names)}
    taken = {name: torch.zeros(8, 4, dtype=torch.bool) for name in Bs}
    for _ in range(4):  # sparsity 0.75
        found = magnitude_masks(Bs, 0.75, scope, structure, taken)
        for group in {group_of(name, scope) for name in names}:
            own = [name for name in names if group_of(name, scope) == group]
            rows = structure == "rows"
            score = torch.cat([Bs[n].double().norm(dim=1) if rows else Bs[n].abs().flatten() for n in own])
            shut = torch.cat([taken[n].any(1) if rows else taken[n].flatten() for n in own])
            chosen = torch.cat([found[n].all(1) if rows else found[n].flatten() for n in own])
            assert chosen.sum() == kept_of(len(score), 0.75)
            assert not (chosen & shut).any()
            free = ~shut & ~chosen
            assert not free.any() or score[chosen].min() >= score[free].max()
        taken = {name: taken[name] | mask for name, mask in found.items()}
    assert all(mask.all() for mask in taken.values())  # four quarters


def test_no_free_entries_are_an_error_that_says_how_many_tasks_fit():
    B = {"layers.0.q_proj": gaussian(4, 4, seed=0)}
    half = magnitude_masks(B, 0.5)
    rest = magnitude_masks(B, 0.5, taken=half)
    both = {name: half[name] | rest[name] for name in B}
    assert both["layers.0.q_proj"].all()
    with pytest.raises(ValueError, match="must find 8 free entries of 16 at sparsity 0.5; found 0: 2 tasks"):
        magnitude_masks(B, 0.5, taken=both)
    with pytest.raises(ValueError, match="taken must have the modules of Bs"):
        magnitude_masks(B, 0.5, taken={})
    with pytest.raises(ValueError, match="taken must have the shape of B"):
        magnitude_masks(B, 0.5, taken={"layers.0.q_proj": torch.zeros(4, 3, dtype=torch.bool)})


@pytest.mark.parametrize(("entries", "sparsity", "tasks"), [(100, 0.9, 10), (100, 0.75, 4), (16, 0.7, 3), (10, 0, 1)])
def test_capacity(entries, sparsity, tasks):
    assert capacity(entries, sparsity) == tasks
    assert tasks * kept_of(entries, sparsity) <= entries < (tasks + 1) * kept_of(entries, sparsity)


def test_capacity_of_masks_that_keep_nothing_is_refused():
    with pytest.raises(ValueError, match="sparsity must keep at least one of 3 entries"):
        capacity(3, 0.99)
