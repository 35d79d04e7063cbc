"""The record of conflicts: against gradients taken apart, through a checkpoint, and without altering a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from steps import Prepared
from tiny import tiny_spec

from lori_nb.lab.telemetry import BLOCKS, CHANGE, COSINE, HALVES, RATE, REMOVED, Telemetry, relative_change
from lori_nb.method.adapters import attach
from lori_nb.method.conflicts import combine_stacked, conflicts_of
from lori_nb.method.projection import project_conflicts_reference

BOTH = ("chain_sum", "word_sequence_reversal")


def stacked(seed: int, tasks: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tasks, 3, 4, generator=draw) for name in ("m.A", "m.B")}


def test_the_table_holds_every_pair_under_its_names():
    telemetry, gradients, halves = Telemetry(["one", "two", "three"]), stacked(0, 3), stacked(1, 6)
    for step in range(2):
        taken = {name: each[0] for name, each in gradients.items()}
        whole = {name: each.mean(0) for name, each in gradients.items()}
        of_halves = conflicts_of(halves) if step == 0 else None
        _, blocks = combine_stacked(gradients, "adapter", order="fixed")
        telemetry.add(step, conflicts_of(gradients), relative_change(taken, whole), blocks, of_halves)
    table = telemetry.table()
    assert len(table) == 2 * 2 * (3 + 1) + 2 * (3 + 1 + 1) + 2 * 15
    row = table[(table.measure == COSINE) & (table.step == 1) & (table.tensor == "m.B") & (table.other == "three")]
    flat = gradients["m.B"].flatten(1)
    expected = torch.nn.functional.cosine_similarity(flat[:2], flat[2:3].expand(2, -1))
    assert row["task"].tolist() == ["one", "two"] and np.allclose(row["value"], expected, atol=1e-6)
    inner = table[(table.measure == HALVES) & (table.tensor == "m.A") & (table.task == "two") & (table.other == "two")]
    pair = halves["m.A"].flatten(1)[2:4]
    assert inner["value"].item() == pytest.approx(torch.nn.functional.cosine_similarity(*pair, dim=0).item(), abs=1e-6)
    away = table[table.measure == CHANGE]
    gap = (gradients["m.A"][0] - gradients["m.A"].mean(0)).norm() / gradients["m.A"].mean(0).norm()
    assert away["value"].iloc[0] == pytest.approx(gap.item(), rel=1e-5) and away["task"].isna().all()
    together = torch.cat([flat_of.flatten(1) for flat_of in gradients.values()], dim=1)
    block = table[(table.measure == BLOCKS) & (table.step == 0) & (table.task == "one") & (table.other == "two")]
    expected = torch.nn.functional.cosine_similarity(together[0], together[1], dim=0).item()
    assert block["value"].item() == pytest.approx(expected, abs=1e-6) and set(block["tensor"]) == {"adapter"}
    rate, negative = table[table.measure == RATE], table.loc[table.measure == BLOCKS, "value"] < 0
    assert set(rate["tensor"]) == {"adapter"} and 0 < rate["value"].mean() == pytest.approx(negative.mean())
    lost = table[table.measure == REMOVED]["value"]
    projected = project_conflicts_reference(together)
    assert lost.iloc[0] == pytest.approx(1 - (projected.norm() / together.norm()).item(), abs=1e-6)


def test_a_conflict_rate_counts_the_pairs_that_have_a_cosine():
    telemetry = Telemetry(["one", "two", "three"])
    gradients = {"m.A": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), "m.B": torch.zeros(3, 2)}
    telemetry.add(0, conflicts_of(gradients), torch.zeros(2))
    rates = telemetry.table().query("measure == @RATE").set_index("tensor")["value"]
    assert rates["m.A"] == 1 and np.isnan(rates["m.B"])


def test_a_state_goes_on_as_if_nothing_had_been():
    whole, broken = Telemetry(["a", "b"]), Telemetry(["a", "b"])
    for step in range(4):
        if step == 2:
            resumed = Telemetry(["a", "b"])
            resumed.restore(broken.state(), broken.names)
            broken = resumed
        gradients = stacked(step, 2)
        for one in (whole, broken):
            one.add(
                step, conflicts_of(gradients), torch.zeros(2), conflicts_of(stacked(9 + step, 4)) if step < 3 else None
            )
    pd.testing.assert_frame_equal(whole.table(), broken.table())
    assert Telemetry(["a", "b"]).table().empty


def test_joint_training_is_watched_and_not_changed(tiny_decoder, home):
    """Between two looks at halves the parameters go through the same bits, watched or not."""
    ended = []
    for watched in (True, False):
        prepared = Prepared(tiny_spec(tiny_decoder, tasks=BOTH, steps=80, batch_size=8))
        record = prepared.loop.telemetry
        if not watched:
            prepared.loop.telemetry = None
        for step in range(1, 4):  # a look would be at step 0 and step 4
            prepared.step(step)
        ended.append({name: p.detach().clone() for name, p in prepared.named.items()})
        table = record.table()
        assert table.empty != watched
        if watched:
            assert set(table["measure"]) == {COSINE, CHANGE, RATE} and set(table["step"]) == {1, 2, 3}
            assert (table.loc[table["measure"] == CHANGE, "value"] == 0).all()
            assert table["value"].dropna().between(-1, 1).all()
    assert all(torch.equal(p, ended[1][name]) for name, p in ended[0].items())


def test_halves_are_looked_at_now_and_then(tiny_decoder, home):
    prepared = Prepared(tiny_spec(tiny_decoder, "ortho-lora", tasks=BOTH, steps=40, batch_size=8))
    for step in range(3):
        prepared.step(step)
    table = prepared.loop.telemetry.table()
    assert set(table.loc[table["measure"] == HALVES, "step"]) == {0, 2}  # 20 looks in 40 steps
    assert set(table.loc[table["measure"] == REMOVED, "step"]) == {0, 1, 2}


def test_halves_add_up_to_the_whole(tiny_decoder, home):
    prepared = Prepared(tiny_spec(tiny_decoder, tasks=BOTH, steps=40, batch_size=6))
    with attach(prepared.base.body, prepared.live):
        summed, halves = prepared.loop._task_gradients(0)
        prepared.loop.telemetry = None
        whole, none = prepared.loop._task_gradients(0)
    assert none is None and len(halves.losses) == 2 * len(whole.losses)
    assert torch.allclose(summed.losses, whole.losses, rtol=1e-6)
    for name, gradient in whole.shared.items():
        assert (summed.shared[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max()
        assert not torch.allclose(halves.shared[name][0], gradient[0], rtol=1e-2)


def test_one_task_leaves_no_record(tiny_decoder, home):
    assert Prepared(tiny_spec(tiny_decoder)).loop.telemetry is None
