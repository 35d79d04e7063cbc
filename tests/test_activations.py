"""Functional interference: from factors and one pass as from dense updates row by row; padding counts for nothing."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import gaussian, random_factors

from lori_nb.analysis.functional import ResponseSum, interference_of
from lori_nb.lab.activations import responses
from lori_nb.lab.models import load_base
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_rows
from lori_nb.method.adapters import Factors, attach_factors, target_linears


@pytest.fixture(params=["decoder", "encoder"])
def case(request, home):
    """A base, encoded rows of different lengths, and two adapters, one of fewer modules."""
    base = load_base(str(request.getfixturevalue(f"tiny_{request.param}")), "float32")
    rows = encode_rows(base.tokenizer, base.kind, tuple(get_task("refusal").rows("test", 7)))
    linears = target_linears(base.body)
    adapters = {"one": random_factors(linears, 3, 1, 0.05), "two": random_factors(linears, 2, 99, -0.1)}
    adapters["two"] = dict(list(adapters["two"].items())[:5])
    assert len({len(row.ids) for row in rows}) > 1
    return base, rows, adapters


def dense_responses(base, rows, adapters, attached=None) -> dict[tuple[str, str], float]:
    """‖ΔW x‖² of every token, each row alone, so that there is no padding."""
    squares, modules = {}, dict(base.body.named_modules())
    for row in rows:
        seen = {}

        def listener(name, seen=seen):
            return lambda _, inputs: seen.update({name: inputs[0][0]})

        handles = [modules[m].register_forward_pre_hook(listener(m)) for m in adapters["one"]]
        with torch.no_grad(), attach_factors(base.body, adapters[attached] if attached else {}):
            kinds = {} if row.segments is None else {"token_type_ids": torch.tensor([row.segments])}
            base.body(input_ids=torch.tensor([row.ids]), **kinds)
        for handle in handles:
            handle.remove()
        for name, own in adapters.items():
            for module, f in own.items():
                moved = seen[module].double() @ f.delta().double().T
                squares.setdefault((name, module), []).append(moved.square().sum(1))
    return {key: math.sqrt(float(torch.cat(values).mean())) for key, values in squares.items()}


@pytest.mark.parametrize("attached", [None, "one"])
def test_responses_are_those_of_dense_updates_row_by_row(case, attached):
    base, rows, adapters = case
    expected = dense_responses(base, rows, adapters, attached)
    for batch_size in (3, 16):
        found = responses(base, adapters, rows, attached, batch_size).set_index(["adapter", "module"])["response"]
        assert set(found.index) == set(expected)
        # float32 activations through at most four layers, padded or not
        assert all(found[key] == pytest.approx(value, rel=1e-4) for key, value in expected.items())


def test_an_adapter_at_work_changes_the_activations_and_nothing_stays_behind(case):
    base, rows, adapters = case
    before = {name: dict(module._forward_pre_hooks) for name, module in base.body.named_modules()}
    plain = responses(base, adapters, rows)
    at_work = responses(base, adapters, rows, attached="one")
    assert (plain["response"] - at_work["response"]).abs().max() > 1e-3 * plain["response"].max()
    assert responses(base, adapters, rows).equals(plain)
    assert {name: dict(module._forward_pre_hooks) for name, module in base.body.named_modules()} == before
    assert not any(module._forward_hooks for module in base.body.modules())


def test_another_factorization_moves_activations_as_much():
    parts = [gaussian(*shape, seed=n, dtype=torch.float64) for n, shape in enumerate([(3, 8), (6, 3), (20, 8), (3, 3)])]
    f, x = Factors(parts[0], parts[1], 2.0), parts[2]
    R = torch.linalg.qr(parts[3])[0] * torch.tensor([1.0, 2.0, 4.0])
    other = Factors(torch.linalg.inv(R) @ f.A, f.B @ R, f.scale)
    sums = ResponseSum({"a": {"m": f}, "b": {"m": other}, "c": {"m": Factors(f.A, f.B, 1.0)}})
    sums.add("m", x[:5])
    sums.add("m", x[5:])
    a, b, c = sums.table()["response"]
    assert a == pytest.approx(float((x @ f.delta().T).square().sum(1).mean().sqrt()), rel=1e-10)
    assert a == pytest.approx(b, rel=1e-10) and a == pytest.approx(2 * c, rel=1e-10)


def test_interference_by_hand():
    table = pd.DataFrame(
        [("math", "m", 2.0), ("code", "m", 1.0), ("math", "n", 0.0), ("code", "n", 3.0), ("code", "only", 1.0)],
        columns=["adapter", "module", "response"],
    )
    found = interference_of({"math": table, "code": table}).set_index(["task", "adapter", "module"])["value"]
    assert found["math", "code", "m"] == 0.5 and found["code", "math", "m"] == 2.0
    assert np.isnan(found["math", "code", "n"]) and found["code", "math", "n"] == 0.0
    assert len(found) == 4  # a module that one of two lacks is not compared
    with pytest.raises(
        ValueError, match=r"responses of task 'nlu' must have its own adapter; found \['code', 'math'\]"
    ):
        interference_of({"nlu": table})


def test_an_orthogonal_A_may_still_move_the_activations():
    """⟨ΔW_i, ΔW_j⟩ = 0 through orthogonal A's, and yet inputs that touch both are moved by both."""
    A = torch.eye(4)
    one, two = Factors(A[:2], torch.ones(3, 2), 1.0), Factors(A[2:], torch.ones(3, 2), 1.0)
    assert float((one.delta() * two.delta()).sum()) == 0
    for x, expected in ((torch.ones(5, 4), 1.0), (A[:2], 0.0)):
        sums = ResponseSum({"one": {"m": one}, "two": {"m": two}})
        sums.add("m", x)
        assert interference_of({"one": sums.table()})["value"].tolist() == [expected]


def test_bad_input_is_named_before_any_pass(case):
    base, rows, adapters = case
    module = next(iter(adapters["one"]))
    for change, words in (
        ({"rows": []}, "rows must hold at least one row"),
        ({"attached": "three"}, "attached must be one of one, two; found 'three'"),
        (
            {"adapters": {"one": {"nowhere": adapters["one"][module]}}},
            "adapter module 'nowhere' must be a linear module",
        ),
        (
            {"adapters": {"one": {module: Factors(torch.ones(2, 5), torch.ones(3, 2), 1.0)}}},
            f"A of 'one' at {module} must have d_in = .* columns; found 5",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            responses(**({"base": base, "adapters": adapters, "rows": rows} | change))
