"""The run store: trained once whoever asks, whole or not finished, damage named and mended."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time

import pytest
from tiny import output_of, python, sparse_spec, tiny_spec

from lori_nb.lab import runs
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import cached_states
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import MANIFEST, CorruptRunError, DiskFullError, Store, done_of
from lori_nb.lab.specs import MergeSpec, to_payload
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_decoder_rows
from lori_nb.method.adapter_file import adapter_hash


@pytest.fixture
def base(tiny_decoder, home):
    return tiny_decoder


@pytest.fixture
def store(home) -> Store:
    return Store()


def stages(store: Store, spec) -> list[str]:
    """What a call of ``get`` had to do."""
    seen = []
    store.get(spec, lambda stage, done, total: seen.append(stage))
    return list(dict.fromkeys(seen))


def test_a_run_is_trained_once(base, store):
    spec = tiny_spec(base)
    assert "training" in stages(store, spec)
    run = store.get(spec)
    stamps = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    assert stages(store, spec) == []
    assert stages(Store(), resolve(spec)) == []
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == stamps
    assert run.spec == resolve(spec)
    assert len(run.history) == spec.steps
    assert len(run.predictions) == spec.test_rows
    assert run.value("chain_sum") == run.metrics.loc[0, "value"]


def test_parents_are_trained_first_and_shared(base, store):
    store.get(sparse_spec(base))
    assert stages(store, tiny_spec(base, "lori-d")) == []
    assert len(store.hashes()) == 2


def test_merges_and_base_runs(base, store):
    parts = (tiny_spec(base), tiny_spec(base, tasks=["refusal"]))
    merged = store.get(MergeSpec(parts, (0.5, 0.5), test_rows=16))
    assert merged.metrics["task"].tolist() == ["chain_sum", "refusal"]
    bare = store.get(tiny_spec(base, "base", steps=0))
    assert bare.provenance["trainable_parameters"] == 0
    nothing = store.get(MergeSpec(parts, (0.0, 0.0), test_rows=16))
    assert nothing.metrics.loc[0, "loss"] == bare.metrics.loc[0, "loss"]
    assert merged.metrics.loc[0, "loss"] != bare.metrics.loc[0, "loss"]


def test_provenance_says_where_a_result_comes_from(base, store):
    found = store.get(tiny_spec(base)).provenance
    assert found["packages"]["torch"]
    assert found["spec"]["dtype"] == "float32"
    assert dict(found["spec"]["digests"])["train:chain_sum"]
    needed = {"commit", "dirty", "source_digest", "device", "dtype", "threads", "seconds", "adapter_hash"}
    assert needed <= set(found)


GET = """
import json, sys
from lori_nb.lab import training
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import from_payload
from lori_nb.method.adapter_file import adapter_hash
training.CHECKPOINT_SECONDS = -1.0
def report(stage, done, total): print(stage, done, flush=True)
run = Store().get(from_payload(json.loads(sys.argv[1])), report)
print("hash", adapter_hash(run.adapter))
"""


def test_of_two_processes_one_trains_and_one_waits(base, store):
    payload = json.dumps(to_payload(tiny_spec(base, steps=150)))
    outs = [output_of(process) for process in [python(GET, payload), python(GET, payload)]]
    trained = ["training 150" in out for out in outs]
    assert sorted(trained) == [False, True]
    assert outs[0].split()[-1] == outs[1].split()[-1]


def test_a_killed_run_resumes_to_the_same_bits(base, store, tmp_path):
    spec = tiny_spec(base, steps=100)
    process = python(GET, json.dumps(to_payload(spec)))
    for line in process.stdout:
        if line == "training 30\n":
            break
    process.kill()
    process.communicate()
    assert not store.finished(resolve(spec))
    assert store.unfinished() == [resolve(spec).hash]
    seen = []
    run = store.get(spec, lambda stage, done, total: stage == "training" and seen.append(done))
    assert seen[0] > 20
    expected = Store(tmp_path / "undisturbed").get(spec)
    assert adapter_hash(run.adapter) == adapter_hash(expected.adapter)
    assert run.history.equals(expected.history)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "manifest"])
def test_a_damaged_run_is_named_set_aside_and_done_again(damage, base, store):
    spec = tiny_spec(base, steps=10)
    before = store.get(spec)
    harm = {
        "changed": lambda: (before.folder / "metrics.parquet").write_bytes(b"x"),
        "cut": lambda: (before.folder / "adapter.safetensors").write_bytes(b""),
        "missing": lambda: (before.folder / "history.parquet").unlink(),
        "manifest": lambda: (before.folder / MANIFEST).write_text('{"ha'),
    }
    expected = before.provenance["adapter_hash"]
    harm[damage]()
    named = {"changed": "metrics.parquet", "cut": "adapter.safetensors", "missing": "history.parquet"}
    name = named.get(damage, MANIFEST)
    assert name in store.problems(before.hash)[0]
    with pytest.raises(CorruptRunError, match=f"run {before.hash} is damaged: {name}"):
        store.load(before.hash)
    with pytest.warns(UserWarning, match=f"{before.hash} is damaged: {name}.*set aside as .* and done again"):
        again = store.get(spec)
    assert again.provenance["adapter_hash"] == expected
    assert store.problems(again.hash) == []
    assert [path.name[:32] for path in (store.root / "damaged").iterdir()] == [again.hash]


def test_verify_and_unfinished_folders(base, store):
    run = store.get(tiny_spec(base, steps=1))
    assert store.problems(run.hash) == []
    with pytest.raises(FileNotFoundError, match="is not finished in"):
        store.load("0" * 32)
    (run.folder / MANIFEST).unlink()
    assert not store.finished(run.spec)
    assert store.hashes() == []
    assert store.unfinished() == [run.hash]


def test_clean_removes_what_nobody_works_on(base, store):
    done = store.get(tiny_spec(base, steps=1))
    idle, busy = store.root / ("1" * 32), store.root / ("2" * 32)
    for folder in (idle, busy, store.root / "damaged" / "x", store.root / "logs"):
        folder.mkdir(parents=True)
    with runs.FileLock(store.root / f"{busy.name}.lock"):
        assert set(store.clean()) == {idle, store.root / "damaged" / "x"}
    assert busy.exists()
    assert (store.root / "logs").exists()
    assert store.load(done.hash)


def test_the_table_says_how_many_of_how_many(base, store):
    specs = [tiny_spec(base, steps=1, seed=seed) for seed in range(4)]
    assert store.table(specs).attrs == {"finished": 0, "planned": 4}
    assert store.table(specs).empty
    for spec in specs[:2]:
        store.get(spec)
    table = store.table([*specs, specs[0]])
    assert table.attrs == {"finished": 2, "planned": 4}
    assert sorted(table["seed"]) == [0, 1]
    assert set(table["method"]) == {"lora"}
    assert {"task", "metric", "value", "n", "majority", "run", "learning_rate", "rank"} <= set(table)
    assert len(store.table()) == 2
    finished, missing = done_of(specs, store)
    assert [spec.seed for spec in finished] == [0, 1]
    assert [spec.seed for spec in missing] == [2, 3]


# Bad input before any work


def test_a_rank_that_does_not_fit_is_refused_before_a_parent_is_trained(base, store):
    spec = sparse_spec(base)
    calibration = tiny_spec(base, "lori-d", rank=33)
    with pytest.raises(ValueError, match="rank must be between 1 and 32, the smallest dimension of .*k_proj; found 33"):
        store.get(tiny_spec(base, "lori-s", rank=33, sparsity=0.9, calibration=calibration))
    with pytest.raises(ValueError, match="last_layers must be between 1 and 4, the model's layers; found 5"):
        store.get(tiny_spec(base, last_layers=5))
    with pytest.raises(ValueError, match="modules must match a linear module .*; found 'q_prj'"):
        store.get(tiny_spec(base, modules="q_prj"))
    assert not store.root.exists()
    assert resolve(spec).rank == 4


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_room_is_said_before_training(base, store, monkeypatch):
    monkeypatch.setattr(runs, "NEEDED_BYTES", 2**60)
    with pytest.raises(DiskFullError, match=r"must have \d+ MiB free for a run; found \d+ MiB") as caught:
        store.get(tiny_spec(base))
    assert caught.value.errno == errno.ENOSPC
    assert store.hashes() == []


def test_a_disk_that_fills_up(base, small_disk, monkeypatch):
    """The adapter of the second run has no room; the first run is untouched, the second is done once there is."""
    monkeypatch.setattr(runs, "NEEDED_BYTES", 0)
    store = Store(small_disk / "runs")
    small = store.get(tiny_spec(base, "base", steps=0))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 60_000))
    spec = tiny_spec(base, rank=16, last_layers=None, steps=2)  # its adapter takes 240 kB
    with pytest.raises(
        DiskFullError, match="the disk of .* is full; finished runs are untouched, and this one goes on"
    ):
        store.get(spec)
    assert store.problems(small.hash) == []
    assert not store.finished(resolve(spec))
    filler.unlink()
    assert store.get(spec).adapter.rank == 16


def test_a_disk_that_fills_up_under_the_prefix_cache(base, small_disk, monkeypatch):
    """An error, not a killed process, which is what a write to a memory map of a full disk ends in."""
    loaded = load_base(str(base), "float32")
    rows = encode_decoder_rows(loaded.tokenizer, get_task("chain_sum").rows("train", 128))
    monkeypatch.setenv("LORI_NB_HOME", str(small_disk))
    with pytest.raises(OSError, match="No space left on device"):
        cached_states(loaded, rows, 2)
    assert not list((small_disk / "cache" / "prefix").glob("*/offsets.npy"))


def test_times_are_plausible(base, store):
    started = time.time()
    run = store.get(tiny_spec(base, steps=2))
    assert 0 < run.provenance["training_seconds"] < run.provenance["seconds"] + 0.01 < time.time() - started + 1
