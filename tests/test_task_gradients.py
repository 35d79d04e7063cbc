"""Every task's gradient from one backward pass, against a backward pass for each task."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import Prepared, assert_same_gradients
from tiny import tiny_spec
from transformers import OPTConfig, OPTModel

from lori_nb.lab import gradients as gradients_module
from lori_nb.lab.gradients import PADDING, TaskData, of_like_length, recomputed, task_gradients
from lori_nb.lab.laboratory import new_head
from lori_nb.lab.models import load_base
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.text import encode_encoder_rows
from lori_nb.lab.training import named_parameters
from lori_nb.method.adapters import Factors, LowRank, attach, target_linears
from lori_nb.method.task_gradients import NotByRowsError, by_task

BOTH = ("chain_sum", "word_sequence_reversal")
D_IN, D_OUT, RANK, LENGTH = 12, 9, 3, 5


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(train_A: bool, masked: bool = False) -> LowRank:
    mask = gaussian(D_OUT, RANK, seed=2) > 0.5 if masked else None
    return LowRank(
        Factors(gaussian(RANK, D_IN, seed=0), gaussian(D_OUT, RANK, seed=1), 1.5), train_A=train_A, mask=mask
    )


def loss_of(low: LowRank, x: torch.Tensor, seed: int) -> torch.Tensor:
    """A loss that no two tasks share."""
    return (low(x) * gaussian(len(x), LENGTH, D_OUT, seed=seed)).sum().square()


# One module


@pytest.mark.parametrize(("train_A", "masked"), [(True, False), (False, False), (False, True)])
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), seed=st.integers(0, 99))
def test_one_backward_pass_gives_what_one_a_task_gives(train_A, masked, sizes, seed):
    low = low_rank(train_A, masked)
    parts = gaussian(sum(sizes), LENGTH, D_IN, seed=seed).split(sizes)
    with by_task({"m": low}, sizes) as found:
        whole = low(torch.cat(parts)).split(sizes)
        weights = [gaussian(n, LENGTH, D_OUT, seed=t) for t, n in enumerate(sizes)]
        sum((y * w).sum().square() for y, w in zip(whole, weights, strict=True)).backward()
    assert set(found) == {"m.A", "m.B"} if train_A else {"m.B"}
    assert low.values.grad is None and low.A.grad is None and low.task_rows is None
    for task, (x, n) in enumerate(zip(parts, sizes, strict=True)):
        names = list(low.trained())
        alone = torch.autograd.grad(loss_of(low, x, task), list(low.trained().values()))
        for part, gradient in zip(names, alone, strict=True):
            ours = found[f"m.{part}"][task]
            assert ours.shape == gradient.shape
            assert (ours - gradient).abs().max() <= 1e-6 * max(gradient.abs().max(), 1) * (1 + n * LENGTH)
            assert n or not ours.any()


def test_rows_given_to_another_task_change_both():
    low, x = low_rank(True), gaussian(6, LENGTH, D_IN, seed=3)
    results = []
    for sizes in ([3, 3], [2, 4]):
        with by_task({"m": low}, sizes) as found:
            low(x).square().sum().backward()
        results.append(found["m.B"])
    assert torch.allclose(results[0].sum(0), results[1].sum(0), rtol=1e-5)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(*results, strict=True))


def test_a_module_used_twice_adds_up_and_one_unused_is_left_out():
    twice, unused = low_rank(True), low_rank(True)
    x = gaussian(2, LENGTH, D_IN, seed=4)
    results = []
    for uses in (1, 2):
        with by_task({"twice": twice, "unused": unused}, [1, 1]) as found:
            sum(twice(x).square().sum() for _ in range(uses)).backward()
        results.append(found)
    assert set(results[0]) == {"twice.A", "twice.B"}
    assert torch.allclose(2 * results[0]["twice.A"], results[1]["twice.A"])


@pytest.mark.parametrize("shape", [(4, LENGTH, D_IN), (3 * LENGTH, D_IN), (3, D_IN)])
def test_an_input_that_is_not_by_rows_is_named(shape):
    low = low_rank(True)
    words = r"the input of m must be \(rows × places × width\) with the 3 rows of the tasks; found"
    with pytest.raises(NotByRowsError, match=words), by_task({"m": low}, [1, 2]):
        low(gaussian(*shape, seed=0))
    assert low.task_rows is None


def test_a_model_that_flattens_its_rows_trains_task_by_task(home):
    """OPT's feed-forward part sees (rows · places × width)."""
    config = OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=99, word_embed_proj_dim=16
    )
    torch.manual_seed(0)
    body = OPTModel(config).eval().requires_grad_(False).decoder
    linears = target_linears(body, "fc1,fc2", None)
    live = {
        name: LowRank(
            Factors(gaussian(2, m.in_features, seed=1), gaussian(m.out_features, 2, seed=2), 1.0), train_A=True
        )
        for name, m in linears.items()
    }
    ids = torch.arange(12).view(4, 3)
    with attach(body, live), pytest.raises(NotByRowsError), by_task(live, [2, 2]):
        body(input_ids=ids)


def test_training_goes_on_task_by_task_where_rows_cannot_be_told_apart(base, monkeypatch, always_together):
    prepared = Prepared(SPECS["lora"](base))
    assert prepared.loop.together

    def refuse(live, sizes):
        raise NotByRowsError("as a model that flattens its rows")

    with monkeypatch.context() as patched:
        patched.setattr(gradients_module, "by_task", refuse)
        losses, _ = prepared.step(0)
    assert not prepared.loop.together
    expected = Prepared(SPECS["lora"](base))
    expected.loop.together = False
    assert torch.equal(losses, expected.step(0)[0])


def test_a_process_without_rows_sees_such_a_model_too_and_adds_nothing(base, monkeypatch, always_together):
    """Else it would sum all tasks at once where the others sum one after another."""
    monkeypatch.setattr(gradients_module.distributed, "share", lambda pieces: [])
    idle = Prepared(SPECS["lora"](base))
    losses, _ = idle.step(0)
    assert idle.loop.together and torch.equal(losses, torch.zeros(2))

    def refuse(live, sizes):
        raise NotByRowsError("as a model that flattens its rows")

    monkeypatch.setattr(gradients_module, "by_task", refuse)
    idle = Prepared(SPECS["lora"](base))
    assert torch.equal(idle.step(0)[0], torch.zeros(2)) and not idle.loop.together


# A model


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


@pytest.fixture
def always_together(monkeypatch):
    monkeypatch.setattr(gradients_module, "PADDING", 100.0)


SPECS = {
    "lora": lambda base, **c: tiny_spec(base, tasks=BOTH, **c),
    "lori-d": lambda base, **c: tiny_spec(base, "lori-d", tasks=BOTH, **c),
    "lori-s": lambda base, **c: tiny_spec(base, "lori-s", tasks=BOTH, sparsity=0.9, mask_origin="random", **c),
}


RELATIVE = 1e-6  # of a tensor's norm: some eight times float32's precision


def relative_gaps(ours, apart) -> list[float]:
    """‖ours − apart‖ / ‖apart‖ of every task's gradient of every tensor."""
    both = zip(ours, apart, strict=True)
    return [float((one[n] - other[n]).norm() / other[n].norm()) for (_, one), (_, other) in both for n in one]


@pytest.mark.parametrize("name", SPECS)
def test_tasks_together_have_the_gradients_of_a_backward_pass_each(name, base, always_together):
    prepared = Prepared(SPECS[name](base))
    ours, apart = prepared.gradients(), prepared.gradients(together=False)
    assert 0 < max(relative_gaps(ours, apart)) <= RELATIVE
    assert all(abs(one - other) <= RELATIVE * other for (one, _), (other, _) in zip(ours, apart, strict=True))
    assert min(relative_gaps(ours, apart[::-1])) > 1e3 * RELATIVE  # the other task's are others


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [None, 3])
def test_tasks_together_equal_tasks_apart(name, rows, base, always_together):
    one, two = Prepared(SPECS[name](base)), Prepared(SPECS[name](base))
    used = assert_same_gradients(
        one, two, lambda prepared, step: prepared.gradients(step, rows, together=False), steps=2
    )
    assert used > 0  # it is another computation


def test_the_tasks_do_not_get_each_other_s_gradients(base, always_together):
    (_, first), (_, second) = Prepared(SPECS["lora"](base)).gradients()
    for name in first:
        assert (first[name] - second[name]).abs().max() > 0.1 * first[name].abs().max()


def test_bfloat16_agrees_to_its_own_precision(base, always_together):
    prepared = Prepared(replace(SPECS["lora"](base), dtype="bfloat16"))
    eps = torch.finfo(torch.bfloat16).eps
    for (_, ours), (_, apart) in zip(prepared.gradients(), prepared.gradients(together=False), strict=True):
        # some ten roundings in each of four layers, down and up, independent of each other: their errors add in squares
        gaps = [(ours[name] - apart[name]).norm() / apart[name].norm() for name in ours]
        assert max(gaps) < 80**0.5 * eps / 2
    assert prepared.base.dtype == torch.bfloat16
    ((_, wide), _) = Prepared(SPECS["lora"](base)).gradients()
    assert any(not torch.equal(wide[name], prepared.gradients()[0][1][name]) for name in wide)


def test_activations_computed_again_change_no_bit(base, always_together):
    prepared = Prepared(SPECS["lora"](base))
    plain = prepared.gradients()
    with recomputed(prepared.base.body):
        again = prepared.gradients()
    for (_, ours), (_, other) in zip(plain, again, strict=True):
        assert all(torch.equal(ours[name], other[name]) for name in ours)


def encoder_with_factors(spec):
    """An encoder in float32 and factors for it, of which neither is zero."""
    loaded = load_base(spec.base, "float32")
    linears = target_linears(loaded.body, spec.modules, spec.last_layers)
    return loaded, {
        name: LowRank(
            Factors(gaussian(4, m.in_features, seed=1) / 9, gaussian(m.out_features, 4, seed=2) / 9, 2.0), train_A=True
        )
        for name, m in linears.items()
    }


@pytest.mark.parametrize("at_a_time", [None, 3])
@pytest.mark.parametrize("halved", [False, True])
def test_rows_together_by_length_equal_batches_apart(tiny_encoder, home, registries, at_a_time, halved):
    """Tasks cut over several passes, passes with rows of several tasks and passes without rows of some."""
    from lori_nb.lab.tasks import task

    words = {
        "long and short": [3, 30, 60, 31],
        "short": [2, 4, 3, 4],
        "long": [58, 61, 29, 60],
        "mixed": [15, 3, 30, 2],
    }
    for name, lengths in words.items():

        @task(name, domain="x", metric="accuracy", licence="own", labels=("a", "b"), reads="encoder")
        def rows(split, name=name, lengths=tuple(lengths)):
            for place, length in enumerate(lengths):
                yield Example(f"{name} {place}" + " word" * length, answer="ab"[place % 2], target=place % 2)

    spec = tiny_spec(tiny_encoder, tasks=list(words))
    loaded, live = encoder_with_factors(spec)
    tasks = [
        TaskData(name, encode_encoder_rows(loaded.tokenizer, list(get_task(name).rows("train", 4))), None, head)
        for name, head in ((name, new_head(spec, loaded, name)) for name in words)
    ]
    batches, totals = [(task, [0, 1, 2, 3]) for task in tasks], None
    if halved:
        batches, totals = [(task, part) for task in tasks for part in ([0, 1], [2, 3])], [4] * 8
    passes = of_like_length([[len(task.rows[i].ids) for i in indices] for task, indices in batches])
    assert len(passes) > 2 and any(not places for part in passes for places in part)
    assert any(sum(map(bool, part)) > 1 for part in passes)
    named = named_parameters(live, tasks)
    with attach(loaded.body, live):
        ours, apart = (
            task_gradients(loaded, loaded.body, batches, named, at_a_time, each, totals) for each in (live, None)
        )
    assert torch.allclose(ours.losses, apart.losses, rtol=RELATIVE)
    for one, other in ((ours.shared, apart.shared), (ours.heads, apart.heads)):
        assert one.keys() == other.keys() and len(one)
        for name, gradient in other.items():
            # a sum over passes has as many roundings more; in heads' gradients classes nearly cancel
            assert (one[name] - gradient).norm() <= 10 * len(passes) * RELATIVE * gradient.norm(), name
    assert all(ours.shared[name][t].norm() > 0 for name in ours.shared for t in range(len(batches)))


def test_heads_of_an_encoder_s_tasks(tiny_encoder, home, registries, always_together):
    from lori_nb.lab.tasks import SPLITS, task

    @task("odd", domain="x", metric="accuracy", licence="own", labels=("even", "odd"), reads="encoder")
    def odd(split):
        for n in range(SPLITS.index(split), 60, 3):
            yield Example(f"number {n}", second="is it odd?", answer=("even", "odd")[n % 2], target=n % 2)

    @task("size", domain="x", metric="pearson", licence="own", reads="encoder")
    def size(split):
        for n in range(SPLITS.index(split), 60, 3):
            yield Example(f"what is {n}", answer=str(n), target=n / 10)

    spec = tiny_spec(tiny_encoder, tasks=["odd", "size"])
    loaded, live = encoder_with_factors(spec)
    tasks = []
    for each in (odd, size):
        encoded = encode_encoder_rows(loaded.tokenizer, list(each.rows("train", 6)))
        tasks.append(TaskData(each.name, encoded, None, new_head(spec, loaded, each.name)))
    named, batches = named_parameters(live, tasks), [(task, [0, 1, 2, 3]) for task in tasks]
    with attach(loaded.body, live):
        ours, apart = (task_gradients(loaded, loaded.body, batches, named, live=each) for each in (live, None))
    assert set(ours.heads) == {f"head.{task.name}.{part}" for task in tasks for part in ("weight", "bias")}
    pairs = [(ours.losses, apart.losses), *((ours.heads[n], apart.heads[n]) for n in ours.heads)]
    pairs += [(ours.shared[n][t], apart.shared[n][t]) for n in ours.shared for t in range(2)]
    for one, other in pairs:
        assert other.abs().max() > 0
        assert (one - other).norm() <= RELATIVE * other.norm()
    assert all((ours.shared[n][0] - apart.shared[n][1]).norm() > 0.1 * apart.shared[n][1].norm() for n in ours.shared)


# Which rows go together


def tokens(passes, lengths) -> int:
    """What goes through the model, padding too."""
    each = [[batch[i] for batch, rows in zip(lengths, part, strict=True) for i in rows] for part in passes]
    return sum(len(found) * max(found) for found in each)


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), min_size=1, max_size=4))
def test_passes_hold_every_row_once_and_cost_least(lengths):
    passes = of_like_length(lengths)
    for place, batch in enumerate(lengths):
        rows = [part[place] for part in passes]
        assert all(each == sorted(each) for each in rows)
        assert sorted(i for each in rows for i in each) == list(range(len(batch)))
    flat = sorted((length for batch in lengths for length in batch), reverse=True)
    ways = [
        [flat[start:end] for start, end in itertools.pairwise((0, *ends, len(flat)))]
        for count in range(len(flat))
        for ends in itertools.combinations(range(1, len(flat)), count)
    ]
    least = min(sum(len(each) * each[0] for each in way) + PADDING * sum(flat) * len(way) for way in ways)
    assert tokens(passes, lengths) + PADDING * sum(flat) * len(passes) == pytest.approx(least)


def test_like_lengths_go_together_and_unlike_ones_apart():
    assert of_like_length([[50, 49], [50, 50], [49, 50]]) == [[[0, 1], [0, 1], [0, 1]]]
    assert of_like_length([[200, 10], [10, 10], [198, 200]]) == [[[0], [], [0, 1]], [[1], [0, 1], []]]
    assert of_like_length([[7]]) == [[[0]]]
    mixed = [[120, 60, 70, 30], [12, 10, 11, 9]]
    assert tokens(of_like_length(mixed), mixed) < sum(len(batch) * max(batch) for batch in mixed)
