"""Ortho-LoRA's projection: the batched Gramian form equals the literal loop, PCGrad's library, and its own promises.

The bound. One step of the loop is the projection of g_i onto a half space, which never lengthens a distance, so
errors of the T − 1 steps only add. The error of a step is that of its inner product, at most γ_n Σ_t |C_it| ‖g_t‖
‖g_j‖ with γ_n = n ε / (1 − n ε), and |C_it| ‖g_t‖ ≤ ‖g_i‖ because task t is projected off once. So both forms lie
within T (T + 1) γ_{n+4T} ‖g_i‖ of the exact projection of g_i, and within twice that of each other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import PCGrad

from lori_nb.method.conflicts import GROUPINGS, combine, conflicts_of
from lori_nb.method.projection import (
    fixed_orders,
    project_conflicts_reference,
    projection_matrices,
    random_orders,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gamma(n: int, dtype: torch.dtype) -> float:
    return n * torch.finfo(dtype).eps / (1 - n * torch.finfo(dtype).eps)


def bound(gradients: Tensor) -> Tensor:
    """For each task the distance that the two forms may have (T,); see the top of the file."""
    tasks, n = gradients.shape
    return 2 * tasks * (tasks + 1) * gamma(n + 4 * tasks, gradients.dtype) * gradients.norm(dim=1)


def conflicting(tasks: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random gradients in few dimensions, where about half of all pairs conflict."""
    return torch.randn(tasks, n, generator=seeded(seed), dtype=torch.float64).to(dtype)


def hard_inputs() -> dict[str, Tensor]:
    one, mixed = conflicting(1, 7, 1), conflicting(5, 7, 2)
    signs = torch.tensor([1.0, -1, 1, -1, -1], dtype=torch.float64)[:, None]
    present = torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)[:, None]
    return {
        "one task": one,
        "all zero": torch.zeros(4, 7, dtype=torch.float64),
        "some zero": mixed * present,
        "identical": one.repeat(4, 1),
        "opposite": torch.cat([one, -one]),
        "rank one": one * signs,
        "rank two": conflicting(5, 2, 3) @ conflicting(2, 7, 4),
        "more tasks than dimensions": conflicting(8, 3, 5),
        "scale 1e-15": mixed * 1e-15,
        "scale 1e15": mixed * 1e15,
        "scales 1e-15 to 1e15": mixed * 10.0 ** torch.tensor([-15.0, 15, 0, -7, 7], dtype=torch.float64)[:, None],
        "nearly opposite": torch.cat([one, -one + 1e-9 * conflicting(1, 7, 6)]),
    }


def batched(gradients: Tensor, order: Tensor, reference: str = "original") -> Tensor:
    return projection_matrices((gradients @ gradients.T)[None], order, reference)[0] @ gradients


@pytest.mark.parametrize("name", hard_inputs())
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batched_equals_the_loop_on_hard_inputs(name, seed):
    gradients = hard_inputs()[name]
    order = fixed_orders(len(gradients)) if seed is None else random_orders(1, len(gradients), seeded(seed))[0]
    difference = (batched(gradients, order) - project_conflicts_reference(gradients, order)).norm(dim=1)
    assert (difference <= bound(gradients)).all()


@given(tasks=st.integers(1, 6), n=st.integers(1, 40), seed=st.integers(0, 10**6), single=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batched_equals_the_loop_on_random_inputs(tasks, n, seed, single):
    gradients = conflicting(tasks, n, seed, torch.float32 if single else torch.float64)
    order = random_orders(1, tasks, seeded(seed))[0]
    difference = (batched(gradients, order) - project_conflicts_reference(gradients, order)).norm(dim=1)
    assert (difference <= bound(gradients)).all()


def off_projected_bound(gradients: Tensor, projected: Tensor) -> Tensor:
    """To first order an error in the projected g_j counts 2‖g_i‖ / ‖projected g_j‖ times in g_i.

    So errors relative to ‖g‖ grow by at most 1 + 2 (T − 1) / ρ from task to task, ρ the least share of its norm a
    task kept.
    """
    tasks, norms = len(gradients), gradients.norm(dim=1)
    nonzero = norms > 0
    if not nonzero.any():
        return torch.zeros_like(norms)
    least = float((projected.norm(dim=1) / norms)[nonzero].min())
    return (1 + 2 * (tasks - 1) / least) ** tasks * bound(gradients)


def assert_off_projected_agree(gradients: Tensor, order: Tensor) -> None:
    expected = project_conflicts_reference(gradients, order, "projected")
    difference = (batched(gradients, order, "projected") - expected).norm(dim=1)
    assert (difference <= off_projected_bound(gradients, expected)).all()


@given(tasks=st.integers(2, 5), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_off_projected_gradients_batched_equals_the_loop(tasks, seed):
    assert_off_projected_agree(conflicting(tasks, 30, seed), random_orders(1, tasks, seeded(seed))[0])


@pytest.mark.parametrize("name", ["one task", "all zero", "some zero", "identical", "scale 1e-15", "scale 1e15"])
def test_off_projected_gradients_on_hard_inputs(name):
    gradients = hard_inputs()[name]
    assert_off_projected_agree(gradients, fixed_orders(len(gradients)))


def test_a_vanished_gradient_projects_nothing():
    g = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    order = fixed_orders(2)
    # Task 0 is projected to zero; task 1 then has nothing to be projected off, by loop and batch alike.
    for result in (batched(g, order, "projected"), project_conflicts_reference(g, order, "projected")):
        assert result.tolist() == [[0.0, 0.0], [-1.0, -2.0]]
    assert batched(g, order).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("seed", range(10))
def test_the_roundoff_of_a_vanished_gradient_projects_nothing(seed):
    g = conflicting(1, 7, seed)
    gradients = torch.cat(
        [g, -g / 3]
    )  # a third is inexact, so task 0 leaves roundoff of some direction instead of zero
    loop = project_conflicts_reference(gradients, reference="projected")
    for result in (batched(gradients, fixed_orders(2), "projected"), loop):
        assert torch.equal(result[1], gradients[1])
        assert result[0].norm() <= bound(gradients)[0]


def test_reference_switch_differs():
    gradients = conflicting(4, 3, 0)
    order = fixed_orders(4)
    original, projected = (project_conflicts_reference(gradients, order, ref) for ref in ("original", "projected"))
    assert (original - projected).norm() > 0.1


@given(tasks=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_equals_torchjd_pcgrad_under_its_own_orders(tasks, seed):
    gradients = conflicting(tasks, 8, seed)
    torch.manual_seed(seed)
    drawn = [torch.randperm(tasks) for _ in range(tasks)]  # what PCGrad draws, in its order
    order = torch.stack([row[row != i] for i, row in enumerate(drawn)])
    torch.manual_seed(seed)
    expected = PCGrad()(gradients)
    found = projection_matrices((gradients @ gradients.T)[None], order)[0].sum(0) @ gradients
    assert (found - expected).norm() <= bound(gradients).sum()


def test_which_task_comes_first_decides_for_two_only_off_projected_gradients():
    """Two tasks have one order of the others; what is left is which of them is projected first."""
    two = hard_inputs()["opposite"] + conflicting(2, 7, 8) * 0.3
    assert two[0] @ two[1] < 0
    for form in (batched, project_conflicts_reference):
        original, projected = (
            [form(each, fixed_orders(2), reference).sum(0) for each in (two, two.flip(0))]
            for reference in ("original", "projected")
        )
        assert (original[0] - original[1]).norm() <= bound(two).sum()
        assert (projected[0] - projected[1]).norm() > 0.1


def test_order_decides_for_three_tasks_and_not_for_two():
    three, two = conflicting(3, 2, 4), hard_inputs()["opposite"] + conflicting(2, 7, 8) * 0.3
    forward, backward = fixed_orders(3), fixed_orders(3).flip(1)
    assert (batched(three, forward).sum(0) - batched(three, backward).sum(0)).norm() > 0.1
    assert torch.equal(fixed_orders(2), random_orders(1, 2, seeded(0))[0])
    torch.manual_seed(0)
    assert (batched(two, fixed_orders(2)).sum(0) - PCGrad()(two)).norm() <= bound(two).sum()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_two_projected_tasks_no_longer_work_against_the_other(seed):
    gradients = conflicting(2, 5, seed)
    if gradients[0] @ gradients[1] > 0:
        gradients[1] = -gradients[1]
    projected = batched(gradients, fixed_orders(2))
    slack = bound(gradients) * gradients.norm(dim=1).flip(0)
    assert ((projected * gradients.flip(0)).sum(1) >= -slack).all()
    assert projected[0] @ projected[1] >= -slack.sum()  # nor do the projected ones conflict with each other
    assert gradients[0] @ gradients[1] < -slack.sum()
    assert (projected.sum(0) - gradients.sum(0)).norm() > bound(gradients).sum()


def test_orders_list_every_other_task_once():
    assert fixed_orders(3).tolist() == [[1, 2], [0, 2], [0, 1]]
    orders = random_orders(200, 4, seeded(0))
    assert orders.shape == (200, 4, 3)
    assert torch.equal(orders.sort(-1).values, fixed_orders(4).expand(200, 4, 3))
    assert len({tuple(row) for row in orders[:, 0].tolist()}) == 6  # all orders of three occur
    assert torch.equal(orders, random_orders(200, 4, seeded(0)))
    assert not torch.equal(orders, random_orders(200, 4, seeded(1)))


SHAPES = {"0.q_proj.A": (2, 6), "0.q_proj.B": (5, 2), "0.v_proj.A": (2, 6), "0.v_proj.B": (3, 2)}


def task_gradients(tasks: int, seed: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = seeded(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(tasks)
    ]


@pytest.mark.parametrize("grouping", sorted(GROUPINGS))
@pytest.mark.parametrize("order", ["fixed", "random"])
def test_combine_equals_the_loop_on_every_block(grouping, order):
    gradients, weights = task_gradients(4, 7), [1.0, 0.5, 2.0, 1.5]
    combined, conflicts = combine(gradients, grouping, weights=weights, order=order, generator=seeded(3))
    drawn = random_orders(len(conflicts.groups), 4, seeded(3))
    for index, group in enumerate(conflicts.groups):
        names = [name for name in SHAPES if GROUPINGS[grouping](name) == group]
        rows = torch.stack([torch.cat([task[name].flatten() for name in names]) for task in gradients])
        projected = project_conflicts_reference(rows, None if order == "fixed" else drawn[index])
        expected = torch.tensor(weights, dtype=torch.float64) @ projected
        found = torch.cat([combined[name].flatten() for name in names])
        assert (found - expected).norm() <= 2 * bound(rows).sum() * max(weights)
        assert torch.equal(conflicts.conflict[index], rows @ rows.T < 0)
        directions = rows / rows.norm(dim=1, keepdim=True)
        assert (conflicts.cosines[index] - directions @ directions.T).abs().max() < 2 * gamma(60, torch.float64)
    assert {name: value.shape for name, value in combined.items()} == {n: torch.Size(s) for n, s in SHAPES.items()}


@pytest.mark.parametrize("solver", ["project", "gradvac", "sum"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 2.0, 0.7]])
def test_what_a_solver_changed_and_removed_follows_from_gramians(solver, weights):
    gradients = task_gradients(4, 7)
    combined, found = combine(gradients, "module", solver=solver, weights=weights, reduction="mean", order="fixed")
    for index, group in enumerate(found.groups):
        names = [name for name in SHAPES if GROUPINGS["module"](name) == group]
        rows = torch.stack([torch.cat([task[name].flatten() for name in names]) for task in gradients])
        plain = torch.tensor(weights or [1.0] * 4, dtype=torch.float64) @ rows / 4
        taken = torch.cat([combined[name].flatten() for name in names])
        expected = (taken - plain).norm() / plain.norm()
        assert found.change()[index].item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
        if solver == "project":
            lost = 1 - project_conflicts_reference(rows).norm() / rows.norm()
            assert found.removed[index].item() == pytest.approx(lost.item(), abs=1e-14)
    assert found.change().max() == 0 if solver == "sum" else found.change().min() > 0.01
    assert (found.removed is not None) == (solver == "project")
    with pytest.raises(ValueError, match="coefficients must be those of a combined gradient; found None"):
        conflicts_of({name: torch.stack([task[name] for task in gradients]) for name in SHAPES}).change()


def test_groupings_differ_and_a_function_may_group():
    gradients = task_gradients(3, 1)
    results = {g: combine(gradients, g, order="fixed")[0]["0.q_proj.B"] for g in GROUPINGS}
    assert all((results["tensor"] - results[g]).norm() > 1e-3 for g in GROUPINGS if g != "tensor")
    own, _ = combine(gradients, lambda name: name.split(".")[-1], order="fixed")
    assert torch.equal(own["0.q_proj.B"], results["factor"])


def test_tensor_grouping_equals_torchjd_tensor_by_tensor():
    gradients = task_gradients(2, 5)
    combined, conflicts = combine(gradients, order="random", generator=seeded(0))
    for name in SHAPES:
        rows = torch.stack([task[name].flatten() for task in gradients])
        assert (combined[name].flatten() - PCGrad()(rows)).norm() <= bound(rows).sum()
    assert conflicts.conflict.any()


def test_without_conflict_it_is_the_plain_sum_and_with_one_it_is_not():
    gradients = [{name: g.abs() for name, g in task.items()} for task in task_gradients(3, 2)]
    combined, conflicts = combine(gradients, order="fixed")
    assert not conflicts.conflict.any()
    assert conflicts.rate().tolist() == [0, 0, 0, 0]
    for name in SHAPES:
        plain = sum(task[name] for task in gradients)
        assert (combined[name] - plain).norm() <= 3 * gamma(3, torch.float64) * plain.norm()
    combined, _ = combine(task_gradients(3, 2), order="fixed")
    assert any((combined[n] - sum(t[n] for t in task_gradients(3, 2))).norm() > 0.1 for n in SHAPES)


@pytest.mark.parametrize("reference", ["original", "projected"])
@pytest.mark.parametrize("order", ["fixed", "random", "mean"])
def test_without_conflict_it_is_exactly_the_weighted_sum(order, reference):
    """No coefficient is anything but the weight itself, so nothing is left to rounding but the sum."""
    gradients, weights = [{n: g.abs() for n, g in task.items()} for task in task_gradients(4, 2)], [1.0, 0.3, 2.0, 0.7]
    settings_ = {"order": order, "reference": reference, "weights": weights, "generator": seeded(0)}
    combined, _ = combine(gradients, **settings_)
    apart, _ = combine(task_gradients(4, 2), **settings_)
    for name in SHAPES:
        plain = torch.tensor(weights, dtype=torch.float64) @ torch.stack([task[name].flatten() for task in gradients])
        assert torch.equal(combined[name].flatten(), plain)
    assert any(
        (apart[n] - sum(w * t[n] for w, t in zip(weights, task_gradients(4, 2), strict=True))).norm() > 0.1
        for n in SHAPES
    )


def test_mean_is_the_sum_over_the_number_of_tasks():
    gradients = task_gradients(4, 0)
    total, _ = combine(gradients, reduction="sum", order="fixed")
    mean, _ = combine(gradients, reduction="mean", order="fixed")
    assert all(torch.equal(total[name], 4 * mean[name]) for name in SHAPES)  # division by 4 is exact


def test_zero_A_gradients_at_the_start_leave_no_nan_and_no_rate():
    gradients = task_gradients(3, 4)
    for task in gradients:
        task["0.q_proj.A"] = torch.zeros(2, 6, dtype=torch.float64)
    combined, conflicts = combine(gradients, order="fixed")
    assert torch.equal(combined["0.q_proj.A"], torch.zeros(2, 6, dtype=torch.float64))
    assert conflicts.cosines[0].isnan().all()
    assert conflicts.rate()[0].isnan()
    assert not conflicts.rate()[1:].isnan().any()


def test_inputs_are_not_altered():
    gradients = task_gradients(3, 0)
    before = [{name: g.clone() for name, g in task.items()} for task in gradients]
    combine(gradients, order="random", generator=seeded(0))
    project_conflicts_reference(rows := conflicting(3, 4, 0), reference="projected")
    assert torch.equal(rows, conflicting(3, 4, 0))
    for task, old in zip(gradients, before, strict=True):
        assert all(torch.equal(task[name], old[name]) for name in SHAPES)


@pytest.mark.parametrize("reference", ["original", "projected"])
@pytest.mark.parametrize("order", ["fixed", "random", "mean"])
def test_one_task_passes_unchanged(order, reference):
    (only,) = task_gradients(1, 0)
    combined, conflicts = combine([only], order=order, reference=reference, generator=seeded(0))
    assert all(torch.equal(combined[name], only[name]) for name in SHAPES)
    assert conflicts.rate().isnan().all()


ONE, OTHER, NONE = [1.0, 2.0], [-2.0, 0.0], [0.0, 0.0]


@pytest.mark.parametrize("grouping", sorted(GROUPINGS))
@pytest.mark.parametrize(
    ("gradients", "original", "projected"),
    [
        ([ONE, NONE], ONE, ONE),  # a zero gradient neither projects nor is projected
        ([NONE, NONE], NONE, NONE),
        ([ONE, ONE], [2.0, 4.0], [2.0, 4.0]),  # equal ones agree
        ([ONE, [-1.0, -2.0]], NONE, [-1.0, -2.0]),  # opposite ones: nothing is left, or the second, which found nothing
        ([ONE, OTHER], [-1.6, 2.8], [-2.0, 2.0]),  # (0, 2) + (−1.6, 0.8), or (0, 2) + (−2, 0)
    ],
)
def test_answers_by_hand(gradients, original, projected, grouping):
    tasks = [{"m.B": torch.tensor(gradient)} for gradient in gradients]
    for reference, expected in {"original": original, "projected": projected}.items():
        combined, _ = combine(tasks, grouping, order="fixed", reference=reference)
        torch.testing.assert_close(combined["m.B"], torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("other", [1.0, 1e-12])
def test_the_projection_does_not_depend_on_the_gradients_scale(scale, other):
    """Squares of 1e-20 and products of 1e15 with 1e15 lie outside of float32's range, or close to its end."""
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    pull = [{"B": scale * one}, {"B": scale * other * two}]
    combined, conflicts = combine(pull, order="fixed")
    expected = scale * torch.tensor([0.5, 0.5]) + scale * other * torch.tensor([0.0, 1.0])
    torch.testing.assert_close(combined["B"], expected, rtol=1e-5, atol=0)
    assert conflicts.conflict[0, 0, 1] and conflicts.cosines[0, 0, 1].item() == pytest.approx(-(0.5**0.5))


def test_gradients_may_differ_by_thirty_five_orders_of_magnitude():
    """The small one is turned by the large one, and the large one gives up its part along the small one's direction."""
    pull = [{"B": 1e15 * torch.tensor([1.0, 0.0])}, {"B": 1e-20 * torch.tensor([-1.0, 1.0])}]
    combined, conflicts = combine(pull, order="fixed")
    torch.testing.assert_close(combined["B"], 1e15 * torch.tensor([0.5, 0.5]), rtol=1e-5, atol=0)
    small, _ = combine(pull, order="fixed", weights=[0.0, 1.0])
    torch.testing.assert_close(small["B"], 1e-20 * torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-26)
    assert conflicts.cosines[0, 0, 1].item() == pytest.approx(-(0.5**0.5))


def test_half_precision_gradients_are_multiplied_in_float64_even_under_autocast():
    gradients = task_gradients(3, 6, torch.bfloat16)
    wide = [{name: g.float() for name, g in task.items()} for task in gradients]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        combined, conflicts = combine(gradients, order="fixed")
    expected, same = combine(wide, order="fixed")
    assert conflicts.cosines.dtype == torch.float64
    assert torch.equal(conflicts.cosines, same.cosines)
    for name in SHAPES:
        assert combined[name].dtype == torch.bfloat16
        assert torch.equal(combined[name], expected[name].to(torch.bfloat16))


def test_non_finite_gradients_are_passed_on_not_hidden():
    gradients = task_gradients(3, 0)
    gradients[1]["0.q_proj.B"][0, 0] = float("nan")
    combined, _ = combine(gradients, order="fixed")
    assert combined["0.q_proj.B"].isnan().any()
    assert combined["0.v_proj.B"].isfinite().all()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"grouping": "layer", "order": "fixed"}, "grouping must be a function or one of tensor, module, .* 'layer'"),
        ({"reduction": "max", "order": "fixed"}, "reduction must be one of sum, mean; found 'max'"),
        ({"order": "sorted"}, "order must be one of random, fixed, mean; found 'sorted'"),
        ({"order": "random"}, "generator must be a torch.Generator when order is 'random'"),
        ({"reference": "own", "order": "fixed"}, "reference must be one of original, projected; found 'own'"),
        ({"weights": [1.0], "order": "fixed"}, r"weights must be 2 finite numbers of at least 0.*found \[1.0\]"),
        ({"weights": [1.0, -1.0], "order": "fixed"}, r"weights must be 2 finite numbers"),
    ],
)
def test_bad_settings_are_named(settings_, words):
    with pytest.raises(ValueError, match=words):
        combine(task_gradients(2, 0), **settings_)


def test_tasks_that_differ_in_tensors_are_named():
    gradients = task_gradients(2, 0)
    del gradients[1]["0.v_proj.B"]
    with pytest.raises(ValueError, match=r"task 1 differs from task 0 in 0\.v_proj\.B"):
        combine(gradients, order="fixed")
    with pytest.raises(ValueError, match="at least one task with at least one tensor; found none"):
        combine([], order="fixed")


ONES, TWO = torch.ones(1, 2, 2), fixed_orders(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: projection_matrices(ONES.half(), TWO), "gramians must be float32 or float64; found torch.float16"),
        (lambda: projection_matrices(ONES[0], TWO), r"gramians must have shape \(G, T, T\); found \(2, 2\)"),
        (lambda: projection_matrices(torch.ones(1, 3, 3), TWO), r"\(3, 2\) or \(1, 3, 2\); found \(2, 1\)"),
        (lambda: project_conflicts_reference(ONES[0], 0 * TWO), r"other of the 2 tasks once; found \[\[0\], \[0\]\]"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
