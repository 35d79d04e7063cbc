"""What every process does that torchrun starts in the tests: python several_processes.py MODE BASE STORE."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_spec

from lori_nb.lab import distributed, gradients
from lori_nb.lab.methods import method
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import RunSpec
from lori_nb.study.selection import train_each

BOTH = ("chain_sum", "word_sequence_reversal")
ALIKE = ("chain_sum", "spell_backward")  # rows of like length: one backward pass
BY_TASK = 0.2  # so few passes that each of the tasks in BOTH has its own: four rows each are added alike by either


def specs(base: str) -> dict[str, RunSpec]:
    """The runs that are trained by one process and by two, by what is special about them."""
    short = {"steps": 6, "test_rows": 40}  # two batches to score, so that each process has one
    dense = tiny_spec(base, "lori-d", **short)
    sparse = tiny_spec(base, "lori-s", sparsity=0.9, calibration=dense, **short)
    later = {"tasks": BOTH[1:], "start": tiny_spec(base, **short)} | short
    apart = {"tasks": BOTH[1:], "start": sparse, "sparsity": 0.9, "mask_origin": "free"} | short
    return {
        "lora": tiny_spec(base, **short),
        "lori-d in bf16": replace(dense, dtype="bfloat16"),
        "lori-s": sparse,
        "ortho-lora in one pass": tiny_spec(base, "ortho-lora", tasks=ALIKE, **short),
        "ortho-lora in micro-batches": tiny_spec(base, "ortho-lora", tasks=BOTH, micro_batch_rows=1, **short),
        "a row left over": tiny_spec(base, batch_size=7, checkpointing=True, **short),
        "an idle process": tiny_spec(base, batch_size=1, **short),
        "disjoint masks": tiny_spec(
            base, "lori-s", calibration=tiny_spec(base, "lori-d", tasks=BOTH[1:], start=dense, **short), **apart
        ),
        **{name: tiny_spec(base, name, **later) for name in ("ewc", "o-lora")},
        # earlier rows are fewer than a batch's: only row by row are they added alike by any number of processes
        **{name: tiny_spec(base, name, micro_batch_rows=1, **later) for name in ("replay", "memory-projection")},
    }


def by_length(base: str) -> RunSpec:
    """A run whose rows go through the model by length, whatever task they are of."""
    return tiny_spec(base, "ortho-lora", tasks=BOTH, steps=6, test_rows=40)


def train(base: str, store: Path) -> None:
    """All runs, and what the processes tell one another."""
    plain, gradients.PADDING = gradients.PADDING, BY_TASK
    me, others = distributed.rank(), distributed.count() - 1
    assert (others, distributed.device().type) == (1, "cpu")
    assert distributed.decided(lambda: f"asked in {me}") == "asked in 0"
    assert distributed.gathered({me: 10 * me}) == {0: 0, 1: 10}
    assert distributed.summed([torch.tensor([1.0 + me]), torch.full((2, 2), 2.0)])[0].tolist() == [3.0]
    assert list(distributed.share(range(5))) == ([0, 1], [2, 3, 4])[me]
    assert list(distributed.dealt(range(5))) == ([0, 2, 4], [1, 3])[me]
    try:
        distributed.check_same("the number", me)
    except distributed.ProcessesError as error:
        assert str(error) == "the number must be the same in all 2 processes; found 0 in process 0, 1 in process 1"
    else:
        raise AssertionError("different numbers passed for the same")
    train_each(list(specs(base).values()), print, Store(store))
    gradients.PADDING = plain
    train_each([by_length(base)], print, Store(store))
    distributed.leave()


def lose_one(base: str, store: Path) -> None:
    """Process 1 is killed after the fourth step, while process 0 waits for it."""

    @method("lora-lost", like="lora", hook="after_step")
    def end(live, step):
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        Store(store).get(tiny_spec(base, "lora-lost", steps=30))
    except distributed.ProcessesError as error:
        print(f"process {distributed.rank()}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "lose_one": lose_one}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
