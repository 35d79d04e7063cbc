"""Two processes train what one process trains, bit for bit where both add the same micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several_processes import ALIKE, BY_TASK, by_length, specs
from steps import EPS, LAYERS, LONGEST_PRODUCT, Prepared
from tiny import TESTS

from lori_nb.lab import gradients
from lori_nb.lab.gradients import micro_batches
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Run, Store


def torchrun(mode: str, base: Path, store: Path) -> subprocess.CompletedProcess:
    """What two processes on this machine's CPU print and how they end."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, str(TESTS / "several_processes.py"), mode, str(base), str(store)],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


PLAIN = gradients.PADDING


@pytest.fixture(scope="module", autouse=True)
def by_task():
    """As in the processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "PADDING", BY_TASK)
        yield


@pytest.fixture(scope="module")
def together(tiny_decoder, session_home, tmp_path_factory) -> Store:
    """The runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        done = torchrun("train", tiny_decoder, folder)
    assert done.returncode == 0, done.stderr
    assert f"done: {len(specs('x'))} runs and those they build on, in {folder}" in done.stdout
    return Store(folder)


def in_pieces_for_two(spec):
    """The same run by one process, in the micro-batches that two processes would compute."""
    rows = spec.batch_size // (1 if spec.tasks == ALIKE else len(spec.tasks))  # of what goes through the model as one
    largest = max(map(len, micro_batches(range(rows), spec.micro_batch_rows, 2)))
    before = {name: getattr(spec, name) for name in ("start", "calibration")}
    return replace(
        spec, micro_batch_rows=largest, **{name: in_pieces_for_two(run) for name, run in before.items() if run}
    )


def assert_same_bits(one: Run, two: Run) -> None:
    for name, f in one.adapter.factors.items():
        assert torch.equal(f.A, two.adapter.factors[name].A), name
        assert torch.equal(f.B, two.adapter.factors[name].B), name
    assert one.history.equals(two.history)
    assert one.conflicts.equals(two.conflicts)
    assert one.metrics.equals(two.metrics)
    assert one.predictions.equals(two.predictions)


@pytest.mark.parametrize("name", specs("x"))
def test_two_processes_give_the_bits_of_one(name, together, tiny_decoder, home, tmp_path):
    """Each micro-batch has the same gradient in either, and with two addends a sum has no order."""
    spec = specs(str(tiny_decoder))[name]
    found = together.load(resolve(spec).hash)
    alone = Store(tmp_path).get(in_pieces_for_two(spec))
    assert_same_bits(found, alone)
    assert (found.provenance["processes"], alone.provenance["processes"]) == (2, 1)


def test_tasks_of_like_length_share_a_pass_and_others_do_not(tiny_decoder, home):
    """What the runs above stand for: one backward pass for all tasks, shared among processes, and one a task."""
    four = [0, 1, 2, 3]
    expected = {"ortho-lora in one pass": [[four, four]], "ortho-lora in micro-batches": [[[], four], [four, []]]}
    for name, passes in expected.items():
        prepared = Prepared(specs(str(tiny_decoder))[name])
        for step in range(prepared.spec.steps):
            lengths = [[len(task.rows[i].ids) for i in rows] for task, rows in prepared.batches(step)]
            assert gradients.of_like_length(lengths) == passes


def test_other_micro_batches_give_other_bits(together, tiny_decoder, home, tmp_path):
    """So equal bits mean that the rows were shared as said; the whole batch differs from its halves by rounding."""
    spec = specs(str(tiny_decoder))["lora"]
    halves, whole = together.load(resolve(spec).hash), Store(tmp_path).get(spec)
    assert not halves.history.equals(whole.history)
    first, again = halves.history["loss"][0], whole.history["loss"][0]  # before any step
    assert first == pytest.approx(again, rel=4 * LAYERS * LONGEST_PRODUCT * EPS)


def test_a_run_with_micro_batches_of_its_own_is_the_same_run_on_any_number_of_processes(
    together, tiny_decoder, home, tmp_path
):
    spec = specs(str(tiny_decoder))["ortho-lora in micro-batches"]
    alone = Store(tmp_path).get(spec)
    assert_same_bits(together.load(alone.hash), alone)


def test_rows_by_length_are_shared_too(together, tiny_decoder, home, tmp_path, monkeypatch):
    """In pieces of other sizes than one process has, so up to rounding, which Adam's first steps make larger."""
    spec = by_length(str(tiny_decoder))
    monkeypatch.setattr(gradients, "PADDING", PLAIN)
    prepared = Prepared(spec)
    lengths = [[[len(t.rows[i].ids) for i in rows] for t, rows in prepared.batches(step)] for step in range(spec.steps)]
    assert any(sum(bool(part[1]) for part in gradients.of_like_length(each)) > 1 for each in lengths)
    found, alone = together.load(resolve(spec).hash), Store(tmp_path).get(spec)
    assert found.history["loss"].to_numpy() == pytest.approx(alone.history["loss"].to_numpy(), rel=1e-3)
    assert not found.history.equals(alone.history)


def test_every_row_is_scored_once(together, tiny_decoder, home):
    spec = specs(str(tiny_decoder))["lora"]
    predictions = together.load(resolve(spec).hash).predictions
    assert predictions["row"].tolist() == list(range(spec.test_rows))


def test_one_writes(together):
    """Nothing half written, no checkpoint and no second copy is left."""
    for spec_hash in together.hashes():
        assert not together.problems(spec_hash)
    assert not together.unfinished()


def test_the_end_of_one_process_is_the_end_of_all(tiny_decoder, home, tmp_path):
    started = time.monotonic()
    done = torchrun("lose_one", tiny_decoder, tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - started < 300  # nobody waits for the one that is gone
    assert "SIGKILL" in done.stderr
    (unfinished,) = Store(tmp_path).unfinished()
    assert Store(tmp_path).clean() == [tmp_path / unfinished]  # its lock was let go
