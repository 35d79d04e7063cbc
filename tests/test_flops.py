"""Counted operations: equal to PyTorch's counter on real training, and to the closed form of a matrix product."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import sparse_spec, tiny_spec
from torch.utils.flop_counter import FlopCounterMode

from lori_nb.lab import prefix, training
from lori_nb.lab.flops import prefix_flops, step_flops, training_flops
from lori_nb.lab.gradients import task_gradients
from lori_nb.lab.laboratory import _live, _task_data
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import split_at, suffix_body
from lori_nb.lab.runs import Store, quiet
from lori_nb.lab.tasks import SPLITS, Example, task
from lori_nb.lab.tasks.base import _TASKS
from lori_nb.method.adapters import target_linears

STEPS = 3


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache with nothing in it, so that it has to be filled."""
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "own"))


@pytest.fixture
def odd_or_even():
    """The name of a small task for encoders, of texts of different lengths."""

    @task("odd-length", domain="x", metric="accuracy", licence="own", labels=("even", "odd"), reads="encoder")
    def rows(split: str):
        start = 100 * SPLITS.index(split)
        return [
            Example("word " * (i % 7 + 1) + f"{start + i}", ("even", "odd")[i % 2], target=i % 2) for i in range(40)
        ]

    yield rows.name
    _TASKS.pop(rows.name)


def counted_in_training(spec, folder) -> tuple[float, float]:
    """(operations of really training a spec, operations of filling its cache), by PyTorch's counter; of training those
    that find gradients, not those of what is done to them.
    """
    found = []

    def counted(*arguments):
        with FlopCounterMode(display=False) as counter:
            gradients = task_gradients(*arguments)
        found.append(counter.get_total_flops())
        return gradients

    base = load_base(spec.base, "float32")
    first = split_at(base, spec.last_layers)
    live = _live(spec, base, target_linears(base.body, spec.modules, spec.last_layers), Store().adapter_of)
    with FlopCounterMode(display=False) as filling:
        tasks = [_task_data(spec, base, name, first, quiet) for name in spec.tasks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "task_gradients", counted)
        training.train(spec, base, suffix_body(base, first), live, tasks, folder / "checkpoint.safetensors", quiet)
    return sum(found), filling.get_total_flops()


@pytest.mark.parametrize("method", ["lora", "lori-d", "dora", "full"])
@pytest.mark.parametrize("changes", [{}, {"last_layers": None, "modules": "v_proj,o_proj"}, {"micro_batch_rows": 3}])
def test_the_count_is_that_of_real_training(own_cache, tiny_decoder, tmp_path, method, changes):
    spec = tiny_spec(tiny_decoder, method, steps=STEPS, **changes)
    trained, filled = counted_in_training(spec, tmp_path)
    assert training_flops(spec) == trained > 0
    assert prefix_flops(spec) == filled
    assert (filled == 0) == (spec.last_layers is None)


@pytest.mark.parametrize("method", ["lora", "ortho-lora", "ortho-lori-d"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_rows": 3}])
def test_the_count_of_several_tasks_is_that_of_rows_together(own_cache, tiny_decoder, tmp_path, method, changes):
    """Word reversals are of many lengths: their rows take several passes, with rows of the other task in some."""
    both = ("word_sequence_reversal", "chain_sum")
    spec = tiny_spec(tiny_decoder, method, both, steps=STEPS, **changes)
    trained, filled = counted_in_training(spec, tmp_path)
    assert (training_flops(spec), prefix_flops(spec)) == (trained, filled)


def test_the_count_of_an_encoder_s_tasks_holds_every_head(own_cache, tiny_encoder, tmp_path, odd_or_even):
    @task("three", domain="x", metric="accuracy", licence="own", labels=("a", "b", "c"), reads="encoder")
    def rows(split: str):
        return [Example("word " * (i % 5 + 1) + f"{i}", "abc"[i % 3], target=i % 3) for i in range(40)]

    try:
        spec = tiny_spec(tiny_encoder, "ortho-lora", (odd_or_even, "three"), last_layers=2, steps=STEPS)
        assert (training_flops(spec), prefix_flops(spec)) == counted_in_training(spec, tmp_path)
    finally:
        _TASKS.pop("three")


@pytest.mark.parametrize("layers", [2, None])
def test_the_count_of_an_encoder_holds_its_head(own_cache, tiny_encoder, tmp_path, odd_or_even, layers):
    spec = tiny_spec(tiny_encoder, "lori-d", (odd_or_even,), last_layers=layers, steps=STEPS)
    trained, filled = counted_in_training(spec, tmp_path)
    assert (training_flops(spec), prefix_flops(spec)) == (trained, filled)
    # The head: 8 × 32 and 32 × 2, forward, for its weight and for its input; and BERT's own pooler, whose output is
    # not used, forward.
    assert step_flops(spec, odd_or_even, 8).constant == 3 * 2 * 8 * 32 * 2 + 2 * 8 * 32 * 32


def test_a_mask_changes_no_product_and_its_calibration_is_paid_for(own_cache, tiny_decoder, tmp_path):
    spec = sparse_spec(tiny_decoder, steps=STEPS)
    trained, _ = counted_in_training(spec, tmp_path)
    assert training_flops(spec) == trained + training_flops(spec.calibration)
    assert training_flops(spec) == 2 * training_flops(spec.calibration)
    early = replace(spec, calibration=replace(spec.calibration, stop_after=1))
    assert trained < training_flops(early) < training_flops(spec)


def test_the_count_is_the_closed_form_of_a_decoder(tiny_decoder):
    """All linear modules of the last two of four layers: d 64, 4 heads of 16, 2 of them for keys, 96 inside the MLP.

    The last layer's q, o and MLP see m positions of a row, its k and v all of them.
    """
    rows, length, answer, m, rank = 5, 40, 9, 3, 4
    d, kv, inside, vocabulary = 64, 32, 96, 49152
    tokens, asked = rows * length, rows * m
    k_and_v, others = [(d, kv), (d, kv)], [(d, d), (d, d), (d, inside), (d, inside), (inside, d)]
    # (positions, d_in, d_out) of every linear module of both layers
    products = [(tokens, *shape) for shape in (*k_and_v, *k_and_v, *others)] + [(asked, *shape) for shape in others]
    attention = 2 * rows * (length + m) * length * d  # multiplications of Q Kᵀ and of its product with V
    # Forward once, backward to the input once; q, k and v of the first of the layers need no gradient of their input.
    frozen = sum(2 * n * a * b for n, a, b in products) - tokens * (d * d + 2 * d * kv)
    whole = frozen + 3 * attention + 2 * answer * d * vocabulary
    spare = tokens * (d * rank) * 3  # to the inputs of q, k and v of the first layer
    for method, adapters in {
        # forward A x and B h; backward u B, its product with A, and the gradients of B and A
        "lora": sum(3 * n * rank * (a + b) for n, a, b in products) - spare,
        # without the gradient of A; where the input needs none, u B is not formed either
        "lori-d": sum(n * rank * (2 * (a + b) + b) for n, a, b in products) - spare - tokens * rank * (d + 2 * kv),
    }.items():
        found = step_flops(tiny_spec(tiny_decoder, method), "chain_sum", rows).at(length, answer, m)
        assert found == 2 * (whole + adapters), method


def test_lora_costs_more_than_a_frozen_a_and_few_layers_less_than_all(tiny_decoder):
    lora, dense = (tiny_spec(tiny_decoder, method) for method in ("lora", "lori-d"))
    assert training_flops(dense) < training_flops(lora)
    assert training_flops(lora) < training_flops(replace(lora, last_layers=None))
    assert training_flops(tiny_spec(tiny_decoder, "lora-fa")) == training_flops(dense)  # its optimiser is not counted
    assert training_flops(replace(lora, steps=40)) > 1.9 * training_flops(lora)
    assert training_flops(tiny_spec(tiny_decoder, "base", steps=0)) == 0 == prefix_flops(replace(lora, method="base"))


def test_the_cache_is_filled_in_whole_chunks(tiny_decoder):
    one = prefix_flops(tiny_spec(tiny_decoder, train_rows=prefix.CHUNK))
    assert prefix_flops(tiny_spec(tiny_decoder, train_rows=prefix.CHUNK - 1)) <= one
    assert prefix_flops(tiny_spec(tiny_decoder, train_rows=prefix.CHUNK + 1)) >= 2 * one


def test_a_large_base_needs_no_weights():
    found = step_flops(tiny_spec("meta-llama/Meta-Llama-3-8B", "full", last_layers=2), "chain_sum", 1)
    of_input = 4096 * (4096 + 2 * 1024)  # q, k and v of the first layer: no gradient of their input
    k_and_v, others = 2 * 4096 * 1024, 2 * 4096 * 4096 + 3 * 4096 * 14336
    assert found.of_length == 2 * (3 * (2 * k_and_v + others) - of_input)
    assert found.of_asked == 2 * 3 * others  # the last layer's q, o and MLP
    # Q Kᵀ and its product with V, each with two gradients
    assert found.of_square == found.of_asked_length == 2 * 3 * 2 * 4096
    assert (found.of_answer, found.constant) == (4 * 4096 * 128256, 0)
