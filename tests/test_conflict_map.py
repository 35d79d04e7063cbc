"""Which cells of the conflict map lie inside the null: what unrelated tasks have, and two batches of one task."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lori_nb.study.conflict import map_of

SPREAD = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])  # over five seeds
CELLS = {  # layer → cosine between tasks, within a task, inside
    0: (-0.2, 0.3, False),  # against each other, where a task agrees with itself
    1: (-0.2, -0.2, True),  # as far apart as two batches of one task
    2: (0.1, 0.3, False),  # agreeing, if less than a task with itself
    3: (-0.005, 0.3, True),  # no further from 0 than noise reaches
    4: (0.1, 0.1, True),  # agreeing as two batches of one task do
}


def cosines(seeds: int) -> pd.DataFrame:
    rows = [
        {"seed": seed, "step": 0, "layer": layer, "factor": "B", "pairs": pairs, "value": value + shift}
        for layer, (between, within, _) in CELLS.items()
        for seed, shift in enumerate(SPREAD[:seeds])
        # the noise of the two is not the same: seeds turned round
        for pairs, value, shift in (("between", between, shift), ("within", within, SPREAD[::-1][seed]))
    ]
    return pd.DataFrame(rows)


def test_cells_outside_the_null_are_neither_unrelated_nor_as_a_task_s_own():
    table = map_of(cosines(5)).set_index("layer")
    assert table["inside"].to_dict() == {layer: inside for layer, (_, _, inside) in CELLS.items()}
    reach = stats.t.ppf(0.975, 4) * np.std(SPREAD, ddof=1) / np.sqrt(5)
    for layer, (between, within, _) in CELLS.items():
        row = table.loc[layer]
        assert [row["between"], row["low"], row["high"]] == pytest.approx([between, between - reach, between + reach])
        assert row["within"] == pytest.approx(within) and row["n"] == 5


def test_one_seed_tests_nothing():
    table = map_of(cosines(1))
    assert not table["inside"].any() and table["low"].isna().all() and (table["n"] == 1).all()
    assert map_of(cosines(1).iloc[:0]).empty
