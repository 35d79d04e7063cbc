"""Conflict solvers by name: against torchjd on the gradients themselves, against brute force, and their promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchjd import aggregation

from lori_nb.method import solvers
from lori_nb.method.conflicts import combine
from lori_nb.method.projection import all_orders, fixed_orders, project_conflicts_reference
from lori_nb.method.solvers import Problem, get_solver, gradient_vaccine, nash_bargaining, solver

TASKS, SIZE = 4, 60
BY_TORCHJD = {
    "upgrad": aggregation.UPGrad,
    "dualproj": aggregation.DualProj,
    "mgda": aggregation.MGDA,
    "aligned-mtl": aggregation.AlignedMTL,
    "imtl-g": aggregation.IMTLG,
}


def rows(seed: int, tasks: int = TASKS) -> torch.Tensor:
    """Gradients (T × n) that conflict in some pairs."""
    draw = torch.randn(tasks, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shared = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    return draw + shared * torch.tensor([6.0, -3.0, 1.0, -1.5, -0.7, 1.0])[:tasks, None]


def problem_of(gradients: torch.Tensor, **settings) -> Problem:
    tasks = len(gradients)
    return Problem((gradients @ gradients.T)[None], torch.full((tasks,), 1 / tasks, dtype=torch.float64), **settings)


@pytest.mark.parametrize("name", BY_TORCHJD)
@pytest.mark.parametrize("seed", range(3))
def test_torchjd_s_solvers_equal_its_aggregators(name, seed):
    gradients = rows(seed)
    coefficients = get_solver(name)(problem_of(gradients))
    expected = BY_TORCHJD[name]()(gradients)
    assert torch.allclose(coefficients[0] @ gradients, expected, rtol=1e-4, atol=1e-4 * expected.norm())
    assert (coefficients[0] @ gradients - gradients.mean(0)).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("cagrad", ("CAGrad", {"c": 0.4})), ("nash-mtl", ("NashMTL", {"n_tasks": TASKS, "max_norm": 0.0}))],
)
@pytest.mark.parametrize("seed", range(3))
def test_solvers_of_convex_programs_equal_torchjd_s(name, theirs, seed):
    kind, settings = theirs
    gradients = rows(seed)
    found = get_solver(name)(problem_of(gradients))[0] @ gradients
    expected = getattr(aggregation, kind)(**settings)(gradients)
    found, expected = (each / each.norm() for each in (found, expected))  # Nash-MTL's has a scale of its own
    assert (found - expected).norm() <= 1e-5
    assert (found - gradients.mean(0) / gradients.mean(0).norm()).norm() > 1e-3


def test_nash_mtl_is_the_bargain_in_which_every_task_gains_alike(monkeypatch):
    """c_i ⟨g_i, Σ_t c_t g_t⟩ is the same for every task: what G α = 1 / α says, whatever the scale of α."""
    draws = torch.Generator().manual_seed(0)
    problems = [torch.randn(t, n, generator=draws, dtype=torch.float64) for t in (2, 3, 5, 8) for n in (t, 60)]
    for gradients in (*(rows(seed) for seed in range(12)), *problems):
        monkeypatch.undo()
        gradients = gradients * 10 ** torch.linspace(-3, 3, len(gradients), dtype=torch.float64)[:, None]
        problem = problem_of(gradients)
        found = nash_bargaining(problem)[0]
        assert (found > 0).all() and found.sum() == pytest.approx(1)
        gains, without = (c * (problem.gramians[0] @ c) for c in (found, torch.full_like(found, 1 / len(found))))
        assert (gains / gains.mean() - 1).abs().max() < 1e-6
        assert (without / without.mean() - 1).abs().max() > 0.1
        # as good with half the steps: the number is no tolerance
        monkeypatch.setattr(solvers, "NEWTON_STEPS", 30)
        assert torch.allclose(found, nash_bargaining(problem)[0], rtol=1e-6)


def test_blocks_are_solved_together_as_apart():
    blocks = [rows(seed) for seed in range(3)]
    together = torch.stack([block @ block.T for block in blocks])
    for name in (*BY_TORCHJD, "project", "gradvac", "nash-mtl"):
        found = get_solver(name)(Problem(together, torch.full((TASKS,), 1 / TASKS, dtype=torch.float64)))
        apart = torch.cat([get_solver(name)(problem_of(block)) for block in blocks])
        assert torch.allclose(found, apart, rtol=1e-10), name
        assert not torch.allclose(found[0], found[1], rtol=1e-3), name


def test_without_conflict_the_cone_solvers_take_the_mean():
    gradients = rows(0).abs()
    for name in ("project", "sum", "upgrad", "dualproj"):
        found = get_solver(name)(problem_of(gradients))[0] @ gradients
        assert torch.allclose(found, gradients.mean(0), atol=1e-6), name


@pytest.mark.parametrize("reference", ["original", "projected"])
def test_the_mean_over_orders_is_that_over_all_of_them(reference):
    around = torch.tensor([[1.0, 0.0], [-0.7, 0.9], [-0.5, -1.1]], dtype=torch.float64)
    plane = torch.linalg.qr(rows(0, 2).T).Q.T
    gradients = around @ plane + 0.01 * rows(5, 3)  # each conflicts with both others
    assert (gradients @ gradients.T < 0).sum() == 6
    found = get_solver("project")(problem_of(gradients, order="mean", reference=reference))[0] @ gradients
    each = [project_conflicts_reference(gradients, order, reference).mean(0) for order in all_orders(3)]
    assert torch.allclose(found, torch.stack(each).mean(0))
    assert len({tuple(order.flatten().tolist()) for order in all_orders(4)}) == 6
    assert torch.equal(all_orders(4)[0], fixed_orders(4))
    assert any((one - other).norm() > 1e-6 for one, other in itertools.combinations(each, 2))
    with pytest.raises(ValueError, match="tasks must be at most 6 for order 'mean'; found 7"):
        get_solver("project")(problem_of(torch.eye(7, dtype=torch.float64), order="mean"))


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_gradvac_equals_torchjd_over_several_steps(beta):
    theirs, problem = aggregation.GradVacWeighting(beta=beta), problem_of(rows(0, 2))
    for step in range(4):  # two tasks have one order
        gradients = rows(step, 2)
        expected = theirs(gradients @ gradients.T) / 2
        found = gradient_vaccine(problem_of(gradients, state=problem.state), beta)[0]
        assert torch.allclose(found, expected, atol=1e-6)
    fresh = gradient_vaccine(problem_of(gradients), beta)[0]
    assert (fresh - found).abs().max() > 1e-3  # what it remembers matters


@pytest.mark.parametrize(("name", "numbers"), [("gradvac", {"beta": 0.01}), ("cagrad", {"c": 0.9})])
def test_a_solver_s_numbers_change_what_it_does(name, numbers):
    def last(**settings):
        state = {}
        for step in range(3):
            gradients = [{"B": row} for row in rows(step)]
            combined, _ = combine(gradients, solver=name, order="fixed", state=state, **settings)
        return combined["B"]

    assert torch.equal(last(), last(strengths=solvers.strengths_of(name)))
    assert (last() - last(strengths=numbers)).norm() > 1e-2 * last().norm()


def test_a_solver_s_numbers_are_its_own_and_in_range():
    gradients = [{"B": row} for row in rows(0)]
    for name, numbers, words in [
        ("gradvac", {"beta": 1.5}, "beta of solver gradvac must be between 0 and 1; found 1.5"),
        ("cagrad", {"c": -0.1}, "c of solver cagrad must be finite and at least 0; found -0.1"),
        ("cagrad", {"c": float("nan")}, "c of solver cagrad must be finite and at least 0; found nan"),
        ("gradvac", {"c": 0.1}, "strengths of solver gradvac must be among beta; found 'c'"),
        ("project", {"c": 0.1}, "strengths of solver project must be among none; found 'c'"),
    ]:
        with pytest.raises(ValueError, match=words):
            combine(gradients, solver=name, order="fixed", strengths=numbers)


class Ordered(Problem):
    """A problem whose tasks meet the others in an order (T, T − 1) that is given."""

    given: torch.Tensor

    def orders(self) -> torch.Tensor:
        return self.given


def test_gradvac_equals_torchjd_in_its_own_random_orders():
    theirs, state = aggregation.GradVacWeighting(), {}
    for step in range(4):
        gradients = rows(step)
        torch.manual_seed(step)
        drawn = torch.stack([torch.randperm(TASKS - 1) for _ in range(TASKS)])  # places among the others, as it draws
        torch.manual_seed(step)
        expected = theirs(gradients @ gradients.T) / TASKS
        about, before = problem_of(gradients), {name: each.clone() for name, each in state.items()}
        problem = Ordered(about.gramians, about.weights, state=state)
        object.__setattr__(problem, "given", fixed_orders(TASKS).gather(1, drawn))
        assert torch.allclose(gradient_vaccine(problem)[0], expected, atol=1e-6)
        ascending = gradient_vaccine(problem_of(gradients, state=before))[0]
        assert not torch.allclose(ascending, expected, atol=1e-3), "the order matters"


def test_gradvac_begins_as_projection():
    gradients = rows(1)
    found = gradient_vaccine(problem_of(gradients, order="fixed"))[0] @ gradients
    assert torch.allclose(found, project_conflicts_reference(gradients).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", [*BY_TORCHJD, "project", "gradvac", "nash-mtl"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_every_solver_is_defined_on_hard_cases_and_scales_with_the_gradients(name, scale):
    for gradients in (
        torch.zeros(3, SIZE, dtype=torch.float64),
        torch.cat([torch.zeros(1, SIZE, dtype=torch.float64), rows(0, 2)]),
        rows(0, 1).expand(3, -1),
        torch.cat([rows(0, 1), -rows(0, 1)]),
        rows(0, 1),
    ):
        coefficients, at_one = (get_solver(name)(problem_of(s * gradients))[0] for s in (scale, 1.0))
        assert coefficients.isfinite().all(), (name, coefficients)
        assert torch.allclose(coefficients, at_one, rtol=1e-5, atol=1e-7), name
        assert (coefficients @ gradients).norm() <= 4 * gradients.norm(dim=1).max()


def test_cagrad_takes_no_step_where_its_direction_vanishes():
    apart = rows(0, 2) * torch.tensor([1e15, 1e-20], dtype=torch.float64)[:, None]
    for gradients in (torch.cat([rows(0, 1), -rows(0, 1)]), apart):
        assert (get_solver("cagrad")(problem_of(gradients)) == 0).all()
    assert (get_solver("cagrad")(problem_of(rows(0, 2))) != 0).all()


def test_gradvac_stays_bounded_after_equal_gradients():
    same, state = rows(0, 1).expand(2, -1), {}
    for _ in range(40):
        gradient_vaccine(problem_of(same, state=state))
    turned = same + 0.05 * rows(3, 2)
    found = gradient_vaccine(problem_of(turned, state=state))[0]
    assert (found.abs() < 10).all()


def test_one_s_own_solver_works_by_name(registries):
    @solver("one-alone", place=TASKS - 1)
    def one_alone(problem, place=0):
        return torch.eye(problem.gramians.shape[1])[int(place)].expand(problem.gramians.shape[:2])

    gradients = [{"B": row.float()} for row in rows(0)]
    for strengths, place in ((None, 0), ({"place": 2}, 2)):
        combined, _ = combine(gradients, solver="one-alone", order="fixed", strengths=strengths)
        assert torch.equal(combined["B"], gradients[place]["B"])
    for wrong, bounds, words in (
        (lambda problem, power: None, {}, "numbers of solver wrong must have a number as default .*; found 'power'"),
        (lambda problem, order=3: None, {}, "and another name than solver, .*; found 'order'"),
        (lambda problem, power=2: None, {"powr": 3}, "bounds of solver wrong .* its numbers, power; found 'powr'"),
    ):
        with pytest.raises(ValueError, match=words):
            solver("wrong", **bounds)(wrong)
    assert "wrong" not in solvers.SOLVERS
    with pytest.raises(ValueError, match="place of solver one-alone must be between 0 and 3; found 4"):
        combine(gradients, solver="one-alone", order="fixed", strengths={"place": 4})
    with pytest.raises(ValueError, match="solver must be one of project, .*; found 'first'"):
        get_solver("first")


@pytest.mark.parametrize("name", ["mgda", "nash-mtl"])
def test_unequal_weights_are_refused_where_a_solver_sets_its_own(name):
    with pytest.raises(ValueError, match=rf"weights must be equal for solver {name}.* found \[1.0, 2.0\]"):
        combine([{"B": r} for r in rows(0, 2)], weights=[1.0, 2.0], solver=name, order="fixed")
