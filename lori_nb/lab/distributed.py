"""Several processes, one run: who decides and writes, who takes which share, and how the shares are put together.

``torchrun --nproc_per_node N`` starts the processes, accelerate joins them and gives each its device. Every process
holds the whole base model and the same trained parameters, computes its share of every step's rows, and takes the same
optimiser step from the same sums. The main process alone holds locks and writes files, in a data folder that all
processes see. Without torchrun there is one process, and every function here passes its argument through.

Floating-point addition is not associative, so sums are taken along one fixed tree, in a process over its micro-batches
and then over the processes: equal halves, quarters, … of the same micro-batches give the same bits on 1, 2, 4, …
processes with the same kind of device.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

# One process may fill a cache or wait for another study's run for hours; torchrun notices a dead one within seconds.
PATIENCE = datetime.timedelta(days=1)
T = TypeVar("T")
K = TypeVar("K")


class ProcessesError(RuntimeError):
    """Processes of one run differ in what they must share, or one of them has ended."""


@functools.cache
def _state():
    from accelerate import PartialState  # imported late: it starts the process group under torchrun

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and kind.type == "mps":  # it has no float64, which gradients' inner products are taken in
        return PartialState(cpu=True, timeout=PATIENCE)
    # without one that has a library for exchange between processes, accelerate would not join them unless told "cpu"
    alone = kind is None or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"
    return PartialState(cpu="LOCAL_RANK" in os.environ and alone, timeout=PATIENCE)


def count() -> int:
    """The number of processes."""
    return _state().num_processes


def rank() -> int:
    """This process's number, from 0."""
    return _state().process_index


def is_main() -> bool:
    """Whether this process decides and writes: process 0."""
    return rank() == 0


def device() -> torch.device:
    """This process's device: under torchrun the accelerator of its LOCAL_RANK, or the CPU."""
    return _state().device


def leave() -> None:
    """Part from the other processes at the end of all work; collectives are an error afterwards."""
    if count() > 1:
        _state().destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessesError(
            f"process {rank()} lost contact with the other {count() - 1}; the message of the one that ended says why"
        ) from error


def decided(question: Callable[[], T]) -> T:
    """The main process's answer, in every process; the others do not ask. The answer must be picklable."""
    if count() == 1:
        return question()
    from accelerate.utils import broadcast_object_list

    answer = [question() if is_main() else None]
    with _together():
        return broadcast_object_list(answer)[0]


def check_same(name: str, value: object) -> None:
    """ProcessesError unless all processes hold the same value of what ``name`` says."""
    found = gathered({rank(): value})
    if any(each != found[0] for each in found.values()):
        shown = ", ".join(f"{each} in process {number}" for number, each in sorted(found.items()))
        raise ProcessesError(f"{name} must be the same in all {count()} processes; found {shown}")


def gathered(entries: Mapping[K, T]) -> dict[K, T]:
    """The entries of all processes in one dict, in every process; ProcessesError where two hold the same key."""
    if count() == 1:
        return dict(entries)
    from accelerate.utils import gather_object

    with _together():
        everyone = gather_object([dict(entries)])
    merged = {key: value for each in everyone for key, value in each.items()}
    if len(merged) != sum(map(len, everyone)):
        raise ProcessesError("entries must be disjoint between processes; found some twice")
    return merged


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part, consecutive items; parts differ by one item at most, and may be empty."""
    return items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()]


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This process's part, dealt out in turn: an even mix of items that are sorted by size."""
    return items[rank() :: count()]


def tree_sum(addends: Iterable[T], add: Callable[[T, T], T]) -> T:
    """((a₀ + a₁) + (a₂ + a₃)) + …: neighbours are added, then neighbouring sums; an odd one out joins one level higher.

    At most log₂ n + 1 addends and sums exist at a time. ValueError for no addend.
    """
    waiting: list[tuple[int, T]] = []  # (level, sum of 2^level addends), levels falling
    for total in addends:
        level = 0
        while waiting and waiting[-1][0] == level:
            total, level = add(waiting.pop()[1], total), level + 1
        waiting.append((level, total))
    if not waiting:
        raise ValueError("addends must be at least one; found none")
    total = waiting.pop()[1]
    while waiting:
        total = add(waiting.pop()[1], total)
    return total


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the processes along :func:`tree_sum`'s tree; the same bits in every process.

    No process waits for its device. ``tensors`` have the same shapes in all processes and are not altered.
    """
    if count() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _together():
        for partner, receives in tree_partners(rank(), count()):
            if receives:
                theirs = torch.empty_like(flat)
                dist.recv(theirs, partner)
                flat = flat + theirs
            else:
                dist.send(flat, partner)
        dist.broadcast(flat, 0)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def tree_partners(rank: int, count: int) -> Iterator[tuple[int, bool]]:
    """With whom a process exchanges its sum, in order, and whether it receives; who has sent is done."""
    stride = 1
    while stride < count:
        if rank % (2 * stride) == stride:
            yield rank - stride, False
            return
        if rank + stride < count:
            yield rank + stride, True
        stride *= 2
