"""The pool: every spec once, parents first, and what fails does not stop the rest."""

from __future__ import annotations

import io
import threading
import time

import psutil
import pytest
from tiny import sparse_spec, tiny_spec

from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import MergeSpec
from lori_nb.study.display import Display
from lori_nb.study.pool import TrainingFailedError, _Board, train_all


def silent(total: int) -> Display:
    return Display(total, 0, io.StringIO())


def test_a_plan_is_carried_out_once_with_its_parents_first(home, tiny_decoder):
    store = Store()
    sparse, other = sparse_spec(tiny_decoder), tiny_spec(tiny_decoder, tasks=("refusal",))
    merged = MergeSpec((tiny_spec(tiny_decoder), other), (0.5, 0.5), test_rows=16)
    plan = [merged, sparse, other]
    assert train_all(plan, store, 2, silent(5)) == 5  # two parents of the merge, one calibration
    order = store.hashes()
    assert order.index(resolve(sparse.calibration).hash) < order.index(resolve(sparse).hash)
    assert order.index(resolve(other).hash) < order.index(resolve(merged).hash)
    assert train_all(plan, store, 2, silent(5)) == 0
    assert store.hashes() == order


def test_workers_and_this_process_train_the_same_bits(home, tiny_decoder, tmp_path):
    spec = tiny_spec(tiny_decoder)
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    train_all([spec], there, 1, silent(1))
    name = resolve(spec).hash
    assert here.get(spec).provenance["adapter_hash"] == there.load(name).provenance["adapter_hash"]
    assert (
        here.get(tiny_spec(tiny_decoder, seed=1)).provenance["adapter_hash"]
        != there.load(name).provenance["adapter_hash"]
    )


def test_a_failed_run_is_named_and_the_others_are_finished(home, tiny_decoder):
    store = Store()
    sparse = sparse_spec(tiny_decoder)
    broken = tiny_spec(tiny_decoder, learning_rate=1e30)
    good = tiny_spec(tiny_decoder, tasks=("refusal",))
    with pytest.raises(TrainingFailedError, match="loss of task 'chain_sum' must be finite") as caught:
        train_all([broken, good, sparse], store, 2, silent(4))
    assert "lora · chain_sum" in str(caught.value) and "refusal" not in str(caught.value)
    assert store.finished(resolve(good)) and store.finished(resolve(sparse))
    assert not store.finished(resolve(broken))


def test_a_run_that_cannot_be_is_refused_before_anything_is_trained(home, tiny_decoder):
    store = Store()
    broken = tiny_spec(tiny_decoder, rank=64)
    with pytest.raises(ValueError, match="rank must be between 1 and 32"):
        train_all([tiny_spec(tiny_decoder), broken], store, 1, silent(2))
    assert store.hashes() == []


def test_what_builds_on_a_failed_run_is_not_begun(tiny_decoder, home):
    sparse = resolve(sparse_spec(tiny_decoder))
    board = _Board([sparse.calibration, sparse], set())
    taken = board.take()
    assert taken == sparse.calibration
    board.settle(taken, "some error")
    assert board.take() is None
    assert "not begun" in board.failed[sparse.hash]


def test_the_board_prefers_a_task_that_nobody_is_at(tiny_decoder, home):
    first, same, other = (
        resolve(spec)
        for spec in (
            tiny_spec(tiny_decoder),
            tiny_spec(tiny_decoder, seed=1),
            tiny_spec(tiny_decoder, tasks=("refusal",)),
        )
    )
    board = _Board([first, same, other], set())
    assert [board.take(), board.take(), board.take()] == [first, other, same]


def test_a_killed_worker_is_replaced_and_its_run_reported(home, tiny_decoder):
    store = Store()
    long, short = tiny_spec(tiny_decoder, steps=20_000), tiny_spec(tiny_decoder, tasks=("refusal",))
    killer = threading.Thread(target=kill_a_worker_at, args=(store, resolve(long).hash))
    killer.start()
    with pytest.raises(TrainingFailedError, match="the worker ended with status -9"):
        train_all([long, short], store, 1, silent(2))
    killer.join()
    assert store.finished(resolve(short)) and not store.finished(resolve(long))
    assert resolve(long).hash in store.unfinished()


def kill_a_worker_at(store: Store, run: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        workers = [
            p for p in psutil.Process().children(recursive=True) if "lori_nb.study.worker" in " ".join(p.cmdline())
        ]
        if workers and (store.root / run / "spec.json").exists():
            workers[0].kill()
            return
        time.sleep(0.1)
