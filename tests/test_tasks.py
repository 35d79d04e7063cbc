"""Generated tasks: no prompt in two splits, the same rows everywhere, ranges far apart."""

from __future__ import annotations

import itertools

import pytest
import reasoning_gym
from tiny import output_of, python

from lori_nb.lab.tasks import SPLITS, Example, expand_tasks, get_task, register, rows_digest, task, task_names
from lori_nb.lab.tasks.base import _TASKS
from lori_nb.lab.tasks.generated import RANGE, generated_rows, split_of

GENERATED = [name for name in task_names() if get_task(name).source == "generated"]
OFFLINE = [*GENERATED, "refusal"]


def test_the_default_tasks_are_there():
    assert {"family_relationships", "chain_sum", "word_sequence_reversal"} <= set(GENERATED)


@pytest.mark.parametrize("name", OFFLINE)
def test_no_prompt_stands_in_two_splits(name):
    keys = {split: {row.key for row in get_task(name).rows(split, 2000)} for split in SPLITS}
    for one, two in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[two]
    assert all(len(found) >= 64 for found in keys.values())


@pytest.mark.parametrize("name", OFFLINE)
def test_a_split_has_no_prompt_twice_and_shorter_lists_begin_longer_ones(name):
    rows = get_task(name).rows("train", 200)
    assert len({row.key for row in rows}) == len(rows) == 200
    assert get_task(name).rows("train", 30) == rows[:30]


def test_the_same_rows_in_another_process():
    code = (
        "from lori_nb.lab.tasks import get_task, rows_digest\n"
        f"for name in {OFFLINE!r}: print(rows_digest(get_task(name).rows('tune', 50)))"
    )
    here = [rows_digest(get_task(name).rows("tune", 50)) for name in OFFLINE]
    # two seeds of Python's string hash, on which the order of a set of strings depends
    for started in [python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]:
        assert output_of(started).split() == here


def test_rows_digest_follows_text_target_and_order():
    one, two = Example("a", "b"), Example("c", "d", target=1)
    digests = {rows_digest(rows) for rows in ([one, two], [two, one], [one], [one, Example("c", "d", target=2)])}
    assert len(digests) == 4
    assert rows_digest([one, two]) == rows_digest([Example("a", "b"), Example("c", "d", target=1)])


def test_ranges_of_the_splits_do_not_touch(monkeypatch):
    """reasoning-gym draws item i from Random(seed + i), so a data set covers seed … seed + size."""
    covered: dict[str, list[range]] = {split: [] for split in SPLITS}
    real, current = reasoning_gym.create_dataset, []

    def watched(name, seed, size, **options):
        covered[current[-1]].append(range(seed, seed + size))
        return real(name, seed=seed, size=size, **options)

    monkeypatch.setattr(reasoning_gym, "create_dataset", watched)
    for split in SPLITS:
        current.append(split)
        list(itertools.islice(generated_rows("chain_sum", {}, split), 1500))
    ends = [(min(r.start for r in covered[s]), max(r.stop for r in covered[s])) for s in SPLITS]
    assert ends[0][0] == 0
    assert all(len(covered[s]) > 1 for s in SPLITS)
    for (_, stop), (start, _) in itertools.pairwise(ends):
        assert stop + RANGE // 2 < start


def test_a_prompt_belongs_to_one_split():
    found = [split_of(f"prompt {i}") for i in range(3200)]
    shares = {split: found.count(split) / 3200 for split in SPLITS}
    # 16, 4 and 12 of 32 buckets; three standard errors of a share are at most 0.027
    assert shares == pytest.approx({"train": 0.5, "tune": 0.125, "test": 0.375}, abs=0.027)


@pytest.mark.parametrize(
    ("split", "limit", "words"),
    [
        ("dev", 5, "must be one of train, tune, test; found 'dev'"),
        ("train", 0, "limit must be at least 1 row; found 0"),
    ],
)
def test_bad_requests(split, limit, words):
    with pytest.raises(ValueError, match=words):
        get_task("chain_sum").rows(split, limit)


def test_an_unknown_task():
    with pytest.raises(ValueError, match="task must be one of .*chain_sum.*; found 'chain_sums'"):
        get_task("chain_sums")


@pytest.fixture
def registry():
    before = dict(_TASKS)
    yield
    _TASKS.clear()
    _TASKS.update(before)


def test_a_task_of_one_s_own(registry):
    @task("parity", domain="symbolic", metric="exact_match", licence="own")
    def parity(split):
        for number in range(SPLITS.index(split), 300, 3):
            yield Example(prompt=f"Is {number} even or odd?", answer="odd" if number % 2 else "even")

    assert get_task("parity") is parity
    assert parity.rows("test", 2)[0] == Example("Is 2 even or odd?", "even")
    assert expand_tasks("parity, chain_sum, parity") == ("parity", "chain_sum")
    again = register(get_task("chain_sum"))
    assert get_task("chain_sum") is again
    with pytest.raises(ValueError, match="task 'empty' has no row in split 'train'"):
        task("empty", domain="x", metric="accuracy", licence="own")(lambda split: []).rows("train", 1)
