"""Tasks one after another: what each way to protect the earlier ones promises, against loops written out."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest
import torch
from tiny import gaussian, tiny_spec

from lori_nb.lab import continual, stages, training
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.methods import method
from lori_nb.lab.models import load_base
from lori_nb.lab.resolving import check, resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import MergeSpec
from lori_nb.lab.tasks import Example, get_task, task
from lori_nb.lab.text import collate, encode_rows
from lori_nb.method.conflicts import project_off
from lori_nb.method.projection import project_conflicts_reference, random_orders

TASKS = ("chain_sum", "family_relationships", "word_sequence_reversal")


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


@pytest.fixture
def store(home) -> Store:
    return Store()


def sparse_sequence(base, origin: str, count: int = 3, **changes) -> list:
    """LoRI-S on one task after another, each calibrated by LoRI-D after the LoRI-D runs before."""
    runs, dense = [], None
    for place, name in enumerate(TASKS[:count]):
        dense = tiny_spec(base, "lori-d", [name], start=dense)
        settings = {"sparsity": 0.75, "mask_origin": "same-a" if place == 0 else origin} | changes
        start = runs[-1] if runs else None
        runs.append(tiny_spec(base, "lori-s", [name], start=start, calibration=dense, **settings))
    return runs


def bits(adapter) -> dict[str, torch.Tensor]:
    return {name: f.B.view(torch.int32) for name, f in adapter.factors.items()}


@pytest.mark.parametrize("structure", ["entries", "rows"])
def test_disjoint_masks_move_no_bit_of_an_earlier_task(base, store, structure):
    adapters = [store.get(spec).adapter for spec in sparse_sequence(base, "free", mask_structure=structure)]
    sizes = [sum(int(m.sum()) for m in a.masks.values()) for a in adapters]
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]  # as many new entries for every task, none shared
    for earlier, later in zip(adapters[:-1], adapters[1:], strict=True):
        for name, mask in earlier.masks.items():
            assert torch.equal(bits(later)[name][mask], bits(earlier)[name][mask])
            assert torch.equal(later.factors[name].A, earlier.factors[name].A)
        assert any(not torch.equal(bits(later)[name], before) for name, before in bits(earlier).items())


def test_independent_masks_do_move_entries_of_an_earlier_task(base, store):
    first, second = (store.get(spec).adapter for spec in sparse_sequence(base, "same-a", 2))
    moved = [(bits(second)[name] != before)[first.masks[name]].sum() for name, before in bits(first).items()]
    assert sum(moved) > 0


def test_a_task_holds_its_entries_also_where_they_are_zero(base, store):
    from lori_nb.lab.laboratory import _masks
    from lori_nb.method.adapters import LowRank

    inherited = store.get(sparse_sequence(base, "free", 1)[0]).adapter
    zeroed = {name: replace(f, B=torch.zeros_like(f.B)) for name, f in inherited.factors.items()}
    nothing = {name: torch.zeros_like(mask) for name, mask in inherited.masks.items()}
    live = {name: LowRank(f, train_A=False, mask=nothing[name]) for name, f in zeroed.items()}
    held = _masks(live, replace(inherited, factors=zeroed))
    assert all(torch.equal(held[name], mask) for name, mask in inherited.masks.items())
    assert not any(mask.any() for mask in _masks(live, None).values())


def test_a_task_that_does_not_fit_is_refused(base, store):
    runs = sparse_sequence(base, "free", sparsity=0.5)
    store.get(runs[1])
    with pytest.raises(ValueError, match="found 0: 2 tasks with disjoint masks fit"):
        store.get(runs[2])


def test_disjoint_masks_need_masks_to_be_disjoint_from(base):
    dense = tiny_spec(base, "lori-d")
    later = tiny_spec(base, "lori-d", ["family_relationships"], start=dense)
    wrong = tiny_spec(
        base, "lori-s", ["family_relationships"], start=dense, calibration=later, sparsity=0.9, mask_origin="free"
    )
    with pytest.raises(ValueError, match="method of the start run must be one under masks.*'lori-d'"):
        check(wrong)


def second(base, name: str, **options) -> object:
    """The second task by a continual method, after plain LoRA on the first."""
    start = tiny_spec(base, "lora", [TASKS[0]])
    return tiny_spec(base, name, [TASKS[1]], start=start, options=tuple((k, str(v)) for k, v in options.items()))


def same(one, other) -> bool:
    parts = [(one.factors[name], f) for name, f in other.factors.items()]
    return all(a.A.shape == b.A.shape and torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in parts)


def distance(one, other) -> float:
    return sum(float((f.delta() - other.factors[name].delta()).square().sum()) for name, f in one.factors.items())


@pytest.mark.parametrize("name", ["ewc", "replay", "memory-projection", "o-lora"])
def test_every_method_does_something_and_does_it_again(base, store, tmp_path, name):
    adapter = store.get(second(base, name)).adapter
    assert not same(adapter, store.get(second(base, "lora")).adapter)
    assert same(adapter, Store(tmp_path / "again").get(second(base, name)).adapter)


def test_elastic_weights_without_strength_are_plain_lora(base, store):
    assert same(store.get(second(base, "ewc", strength=0)).adapter, store.get(second(base, "lora")).adapter)


def test_elastic_weights_hold_the_adapter_near_the_earlier_one(base, store):
    spec = second(base, "ewc")
    before = store.get(spec.start).adapter
    far = [distance(store.get(second(base, "ewc", strength=s)).adapter, before) for s in (0, 1e3, 1e6)]
    assert far[0] > far[1] > far[2] > 0


def seen_by(store, base, look, memory: int = 5) -> None:
    """Let ``look`` see the stage of a second task, trained on by plain LoRA."""

    @method("seen", like="lora", hook="begin", strengths={"memory": memory})
    def seen(stage):
        look(stage)
        return {}

    store.get(second(base, "seen"))


def gradient_of(base, stage, task, rows) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss by plain autograd, through the whole model."""
    loaded = load_base(str(base), "float32")
    batch = collate([task.rows[row] for row in rows], loaded.tokenizer.pad_token_id)
    loss = task_loss(loaded, logits_at(loaded, loaded.body, batch), batch.targets)
    return dict(zip(stage.shared, torch.autograd.grad(loss, list(stage.shared.values())), strict=True))


def close(found: dict, expected: dict, rtol: float = 1e-4) -> bool:
    return all(
        (found[name] - each).abs().max() <= rtol * each.abs().max() and each.abs().max() > 0
        for name, each in expected.items()
    )


def test_fisher_is_the_mean_square_of_gradients_row_by_row(base, store, registries):
    def look(stage):
        task = stage.earlier[0].task
        expected = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
        for row in range(5):
            for name, g in gradient_of(base, stage, task, [row]).items():
                expected[name] += (g * task.targets([row])).square() / 5
        assert close(continual.fisher(stage, task), expected)
        assert not close(continual.fisher(stage, replace(task, rows=task.rows[:4])), expected)
        checked.append(True)

    checked = []
    seen_by(store, base, look)
    assert checked


def test_elastic_penalty_has_the_gradient_of_its_definition(base, store, registries):
    """After two earlier tasks, each with an optimum and a Fisher information of its own."""

    def look(stage):
        terms = []
        for each in stage.earlier:
            with stage.at(each.adapter):
                terms.append(
                    (continual.fisher(stage, each.task), {n: p.detach().clone() for n, p in stage.shared.items()})
                )
        penalty = continual.elastic_weights(stage)["penalty"]
        with torch.no_grad():
            for p in stage.shared.values():
                p.add_(torch.linspace(-0.1, 0.1, p.numel()).view(p.shape))
        found = dict(
            zip(stage.shared, torch.autograd.grad(penalty(stage.live, 0), list(stage.shared.values())), strict=True)
        )
        expected = {n: sum(3.0 * F[n] * (p - at[n]) for F, at in terms).detach() for n, p in stage.shared.items()}
        assert len(terms) == 2
        assert not same(stage.earlier[0].adapter, stage.earlier[1].adapter)
        assert close(found, expected)
        checked.append(True)

    checked = []

    @method("seen", like="lora", hook="begin", strengths={"memory": 5, "strength": 3.0})
    def seen(stage):
        look(stage)
        return {}

    store.get(tiny_spec(base, "seen", [TASKS[2]], start=second(base, "lora")))
    assert checked


def test_a_stage_puts_back_what_it_changed(base, store, registries):
    def look(stage):
        before = {name: p.detach().clone() for name, p in stage.shared.items()}
        with torch.no_grad():
            next(iter(stage.shared.values())).add_(1.0)
        changed = {name: p.detach().clone() for name, p in stage.shared.items()}
        with stage.at(stage.earlier[0].adapter):
            assert all(torch.equal(p, before[name]) for name, p in stage.shared.items())
        assert all(torch.equal(p, changed[name]) for name, p in stage.shared.items())
        checked.append(True)

    checked = []
    seen_by(store, base, look)
    assert checked


def test_replay_is_the_gradient_of_the_rows_together(base, store, registries):
    def look(stage):
        task, new = stage.earlier[0].task, {name: torch.ones_like(p) for name, p in stage.shared.items()}
        found = continual.replay(stage)["transform"]([new], 0)
        old = gradient_of(base, stage, task, stage.drawn(task, 2, 0))
        expected = {name: (8 * new[name] + 2 * old[name]) / 10 for name in new}
        assert close(found, expected)
        assert stage.drawn(task, 2, 0) != stage.drawn(task, 2, 1)
        checked.append(True)

    checked = []

    @method("seen", like="lora", hook="begin", strengths={"memory": 8, "rows": 2})
    def seen(stage):
        look(stage)
        return {}

    store.get(second(base, "seen"))
    assert checked


def seen_after_two(base, store, look, like: str = "lora", **strengths) -> None:
    """Let ``look`` see the stage of a third task."""

    @method("seen", like=like, hook="begin", strengths=strengths)
    def seen(stage):
        assert len(stage.earlier) == 2
        look(stage)
        return {}

    store.get(tiny_spec(base, "seen", [TASKS[2]], start=second(base, like)))


def test_replay_takes_one_earlier_task_after_another(base, store, registries):
    def look(stage):
        new = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
        transform = continual.replay(stage)["transform"]
        for step, (turn, lap) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            task = stage.earlier[turn].task
            old = gradient_of(base, stage, task, stage.drawn(task, 3, lap))
            assert close(transform([new], step), {name: 3 * g / 11 for name, g in old.items()})
        checked.append(True)

    checked = []
    seen_after_two(base, store, look, memory=8, rows=3)
    assert checked


def test_memory_projection_takes_every_earlier_task_at_the_present_parameters(base, store, registries):
    def look(stage):
        with torch.no_grad():  # somewhere else than where any task ended
            for p in stage.shared.values():
                p.add_(torch.linspace(-0.05, 0.05, p.numel()).view(p.shape))
        olds = [gradient_of(base, stage, e.task, stage.drawn(e.task, 3, step=5)) for e in stage.earlier]
        against = {name: -(olds[0][name] + 2 * olds[1][name]) for name in olds[0]}  # in conflict with both
        others = {name: torch.stack([old[name] for old in olds]) for name in olds[0]}
        found = continual.projected_off_memory(stage)["transform"]([against], 5)
        generator = torch.Generator().manual_seed(stage.spec.seed * 1_000_003 + 5)
        expected = project_off(against, others, generator)
        for name, each in expected.items():
            room = 1e-3 * against[name].norm()  # both gradients are float32, by two ways through the model
            assert (found[name] - each).norm() <= room < (found[name] - against[name]).norm()
        checked.append(True)

    checked = []
    seen_after_two(base, store, look, memory=8, rows=3)
    assert checked


@pytest.mark.parametrize("others", [1, 3])
def test_projecting_off_others_is_the_first_row_of_the_literal_loop(others):
    """Tensor by tensor, off the original others in the order drawn for it."""
    names = {"m.A": (4, 6), "m.B": (5, 4), "n.A": (4, 3)}
    gradient = {name: gaussian(*shape, seed=place) for place, (name, shape) in enumerate(names.items())}
    stacks = {name: gaussian(others, *shape, seed=50 + place) for place, (name, shape) in enumerate(names.items())}
    found = project_off(gradient, stacks, torch.Generator().manual_seed(1))
    orders = random_orders(len(names), others + 1, torch.Generator().manual_seed(1))
    changed = 0
    for order, (name, g) in zip(orders, gradient.items(), strict=True):
        rows = torch.cat([g.flatten()[None], stacks[name].flatten(1)]).double()
        expected = project_conflicts_reference(rows, order)[0]
        torch.testing.assert_close(found[name].flatten().double(), expected, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(found[name], g)
    assert changed  # some conflict was there to remove


def test_projecting_off_what_does_not_conflict_changes_nothing():
    gradient = {"m.A": gaussian(4, 6, seed=0)}
    for sign, kept in ((1, True), (-1, False)):
        others = {"m.A": sign * torch.stack([gradient["m.A"]] * 2)}
        found = project_off(gradient, others, torch.Generator().manual_seed(1))["m.A"]
        assert torch.equal(found, gradient["m.A"]) if kept else found.abs().max() < 1e-5


def test_projecting_needs_the_same_tensors():
    with pytest.raises(ValueError, match="others must have the tensors of gradient"):
        project_off({"m.A": torch.ones(2)}, {"m.B": torch.ones(1, 2)}, torch.Generator())
    with pytest.raises(ValueError, match=r"others must have shape \(T, 2\) in m.A; found \(1, 3\)"):
        project_off({"m.A": torch.ones(2)}, {"m.A": torch.ones(1, 3)}, torch.Generator())


def test_o_lora_freezes_earlier_factors_and_grows(base, store):
    spec = second(base, "o-lora")
    before, after = store.get(spec.start).adapter, store.get(spec).adapter
    assert (after.rank, after.alpha) == (2 * before.rank, 2 * before.alpha)
    for name, f in before.factors.items():
        both = after.factors[name]
        assert torch.equal(both.A[:4], f.A)
        assert torch.equal(both.B[:, :4], f.B)
        assert both.B[:, 4:].abs().max() > 0
        torch.testing.assert_close(
            both.delta() - f.delta(), both.scale * both.B[:, 4:] @ both.A[4:], rtol=1e-4, atol=1e-6
        )


def test_o_lora_s_penalty_is_its_definition_for_all_earlier_tasks(base, store, registries):
    def look(stage):
        found = continual.orthogonal_subspaces(stage)["penalty"](stage.live, 0)
        first, both = (each.adapter.factors for each in stage.earlier)
        terms = [
            (A_i @ low.A.T).square().sum()
            for name, low in stage.live.items()
            for A_i in (first[name].A, both[name].A[4:])
        ]
        torch.testing.assert_close(found, 0.7 * sum(terms), rtol=1e-5, atol=0)
        assert min(terms) > 0
        gradients = torch.autograd.grad(found, [low.A for low in stage.live.values()])
        assert all(g.abs().max() > 0 for g in gradients)
        checked.append(True)

    checked = []
    seen_after_two(base, store, look, like="o-lora", strength=0.7, memory=0)
    assert checked


def test_o_lora_s_penalty_makes_the_new_subspace_orthogonal(base, store):
    def overlap(strength):
        adapter = store.get(second(base, "o-lora", strength=strength)).adapter
        return sum(float((f.A[:4] @ f.A[4:].T).square().sum()) for f in adapter.factors.values())

    assert overlap(100) < 0.1 * overlap(0)


def test_what_has_grown_is_scored_as_it_was_trained(base, store):
    """The frozen factors take part in scoring: the whole adapter, attached at once, gives the same scores."""
    spec = second(base, "o-lora")
    whole = store.get(MergeSpec((resolve(spec),), (1.0,), "cat", spec.test_rows))
    assert whole.value(TASKS[1]) == store.get(spec).value(TASKS[1])
    pairs = [each.metrics["loss"].iloc[0] for each in (whole, store.get(spec))]
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-4)


def test_a_third_task_grows_further_and_others_cannot_go_on(base, store):
    spec = tiny_spec(base, "o-lora", [TASKS[2]], start=second(base, "o-lora"))
    assert store.get(spec).adapter.rank == 12
    with pytest.raises(ValueError, match="method of the start run must be one that leaves the rank as it was"):
        check(tiny_spec(base, "lora", [TASKS[2]], start=second(base, "o-lora")))


def test_options_are_numbers_of_the_method(base):
    for bad in (0, 2.5):
        with pytest.raises(
            ValueError, match=f"option rows of replay must be a whole number of at least 1; found '{bad}'"
        ):
            check(second(base, "replay", rows=bad))
    with pytest.raises(ValueError, match="option strength of ewc must be a number of at least 0; found 'much'"):
        check(second(base, "ewc", strength="much"))
    with pytest.raises(ValueError, match="options must be among .*strength, memory; found 'rows'"):
        check(second(base, "ewc", rows=3))


def test_the_example_of_the_stages_works(base, store, registries):
    """The method in the module's own words, which asks for no rows of earlier tasks."""
    example = textwrap.dedent(stages.__doc__.split("::\n\n", 1)[1])
    anchored = {}
    exec(compile(example, __file__, "exec"), {"method": lambda *a, **k: lambda f: anchored.update(about=(a, k), f=f)})
    arguments, settings = anchored["about"]

    @method(*arguments, **settings)
    def begun(stage):
        return anchored["f"](stage)

    adapter = store.get(second(base, "anchored")).adapter
    assert not same(adapter, store.get(second(base, "lora")).adapter)


def test_kept_rows_are_rows_that_the_earlier_run_was_trained_on(base, store, registries):
    sizes = []
    seen_by(store, base, lambda stage: sizes.append(len(stage.earlier[0].task.rows)), memory=1000)
    assert sizes == [32]


def test_kept_rows_are_drawn_by_the_seed(base, store, registries):
    """Not the first ones, which a file sorted by answer would make a memory of one answer."""
    kept = {}

    @method("seen", like="lora", hook="begin", strengths={"memory": 6})
    def seen(stage):
        kept[stage.spec.seed] = [tuple(row.ids) for row in stage.earlier[0].task.rows]
        return {}

    loaded = load_base(str(base), "float32")
    rows = tuple(get_task(TASKS[0]).rows("train", 32))
    every = [tuple(row.ids) for row in encode_rows(loaded.tokenizer, "decoder", rows, (), get_task(TASKS[0]).system)]
    for seed in (0, 1):
        store.get(tiny_spec(base, "seen", [TASKS[1]], start=tiny_spec(base, "lora", [TASKS[0]], seed=seed), seed=seed))
        assert len(kept[seed]) == 6 and set(kept[seed]) <= set(every)
    assert kept[0] != kept[1] and every[:6] not in kept.values()


def test_fisher_of_a_number_is_that_of_a_normal_density_of_unit_variance(tiny_encoder, store, registries):
    """log p = −(y − ŷ)² / 2 + constant, with y and ŷ standardised as in training."""

    @task("sum", domain="own", metric="pearson", licence="own", reads="encoder")
    def total(split):
        for value in range(40):
            yield Example(prompt=f"{value} and {value % 7}", answer="", target=float(value + value % 7))

    checked = []

    @method("seen", like="lora", hook="begin", strengths={"memory": 4})
    def seen(stage):
        (earlier,) = stage.earlier
        with stage.at(earlier.adapter):
            expected = {name: torch.zeros_like(p) for name, p in stage.shared.items()}
            for row in range(4):
                found = stage.gradients([(earlier.task, [row])])  # of (y − ŷ)²
                for name, g in found.items():
                    expected[name] += (g[0] / 2).square() / 4
            checked.append(close(continual.fisher(stage, earlier.task), expected))
        return {}

    first = tiny_spec(tiny_encoder, "lora", ["sum"], steps=6)
    store.get(tiny_spec(tiny_encoder, "seen", ["sum"], steps=2, start=first, seed=1))
    assert checked == [True]


def test_a_stage_of_several_tasks_is_refused(base):
    start = tiny_spec(base, "lora", [TASKS[0]])
    with pytest.raises(ValueError, match="tasks of a sequence's runs must be one each for method replay"):
        check(tiny_spec(base, "replay", TASKS[1:], start=start))


def test_begin_may_only_return_hooks_of_a_run(base, store, registries):
    @method("odd", like="lora", hook="begin", strengths={"memory": 1})
    def odd(stage):
        return {"optimiser": None}

    with pytest.raises(ValueError, match="begin of odd must return hooks among penalty, transform, after_step"):
        store.get(second(base, "odd"))


@pytest.mark.parametrize("name", ["ewc", "replay", "memory-projection", "o-lora"])
def test_an_encoder_keeps_earlier_heads(name, tiny_encoder, store, registries):
    """The old task's gradient goes through the head that it was left with; that head stays as it is."""
    for number in (0, 1):

        @task(
            f"parity-{number}", domain="own", metric="accuracy", licence="own", reads="encoder", labels=("even", "odd")
        )
        def parity(split, number=number):
            for value in range(40):
                yield Example(
                    prompt=f"{number} {value}",
                    answer=("even", "odd")[(value + number) % 2],
                    target=(value + number) % 2,
                )

    first = tiny_spec(tiny_encoder, "lora", ["parity-0"], steps=6)
    later = tiny_spec(
        tiny_encoder, name, ["parity-1"], steps=6, start=first, evaluate=("parity-0", "parity-1"), watch=(3,)
    )
    before, after = store.get(first).adapter, store.get(later)
    for part in ("weight", "bias"):
        assert torch.equal(after.adapter.extras[f"head.parity-0.{part}"], before.extras[f"head.parity-0.{part}"])
    assert set(after.adapter.extras) == {f"head.parity-{n}.{part}" for n in (0, 1) for part in ("weight", "bias")}
    assert set(after.watched["task"]) == {"parity-0", "parity-1"}
    assert not same(after.adapter, store.get(replace(later, method="lora")).adapter)


# Scores on the way, and scores of other tasks


def watched(base, **changes):
    start = tiny_spec(base, "lora", [TASKS[0]])
    settings = {"evaluate": TASKS[:2], "watch": (5, 15), "watch_rows": 6, "steps": 20} | changes
    return tiny_spec(base, "ewc", [TASKS[1]], start=start, **settings)


def test_watching_changes_nothing_but_what_is_known(base, store):
    run, plain = store.get(watched(base)), store.get(watched(base, watch=()))
    assert same(run.adapter, plain.adapter)
    pd_rows = run.watched[["step", "task", "n"]].drop_duplicates().to_numpy().tolist()
    assert pd_rows == [[5, TASKS[0], 6], [5, TASKS[1], 6], [15, TASKS[0], 6], [15, TASKS[1], 6]]
    assert plain.watched.empty
    assert len(run.metrics) == len(plain.metrics)


def test_a_score_on_the_way_is_that_of_a_run_stopped_there(base, store):
    on_the_way = store.get(watched(base, watch_rows=16)).watched
    stopped = store.get(watched(base, watch=(), stop_after=15)).metrics
    last = on_the_way[on_the_way["step"] == 15].reset_index(drop=True)
    assert last["loss"].tolist() == stopped["loss"].tolist()
    assert last["value"].tolist() == stopped["value"].tolist()


def test_an_interrupted_run_keeps_what_was_watched(base, tmp_path, monkeypatch):
    expected = Store(tmp_path / "whole").get(watched(base))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    broken = Store(tmp_path / "broken")

    def stop(stage, done, total):
        if (stage, done) == ("training", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.get(watched(base), stop)
    run = broken.get(watched(base))
    assert same(run.adapter, expected.adapter)
    assert run.watched.equals(expected.watched)


@pytest.mark.parametrize("at", [2, 7])
def test_an_interrupted_run_under_disjoint_masks_goes_on_to_the_same_bits(base, tmp_path, monkeypatch, at):
    """The earlier task's entries are not in the checkpoint, which holds the new ones alone."""
    sequence = sparse_sequence(base, "free", count=2)
    expected = [Store(tmp_path / "whole").get(spec).adapter for spec in sequence]
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(training, "LOOK_EVERY", 1)  # and saves as often
    broken = Store(tmp_path / "broken")
    broken.get(sequence[1].start), broken.get(sequence[1].calibration)

    def stop(stage, done, total):
        if (stage, done) == ("training", at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.get(sequence[1], stop)
    found = broken.get(sequence[1]).adapter
    assert same(found, expected[1]) and not same(found, expected[0])
    assert all(torch.equal(mask, expected[1].masks[name]) for name, mask in found.masks.items())


def test_steps_to_watch_must_be_steps_of_the_run(base):
    with pytest.raises(ValueError, match="watch must be steps of the run; found \\(5, 21\\)"):
        check(watched(base, watch=(5, 21)))
    with pytest.raises(ValueError, match="watch_rows must be at least 1; found 0"):
        check(watched(base, watch_rows=0))


def test_one_adapter_is_scored_on_other_tasks_without_training(base, store):
    single = resolve(tiny_spec(base, "lora", [TASKS[0]]))
    probe = store.get(MergeSpec((single,), (1.0,), "cat", 16, evaluate=TASKS[:2]))
    assert probe.value(TASKS[0]) == store.get(single).value(TASKS[0])
    assert set(probe.metrics["task"]) == set(TASKS[:2])
