"""What the benchmarks share: counts that do not depend on the machine, interleaved timings, and the results file."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.paths import write_atomically

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
PACKAGES = ("torch", "transformers", "peft")
PAIRS = 30  # the fewest that a timed row is judged by
ROOM = 20.0  # seconds that the pairs of quick calls may take together, where there are more of them
MORE = 10  # times as many pairs at most
Work = Callable[[], object]


def flops(work: Work) -> int:
    """Floating-point operations of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def saved_bytes(forward: Work, exclude: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, each storage once.

    Args:
        exclude: tensors that are there anyway, such as parameters.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # holding it, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(work: Work) -> int:
    """The most bytes on the CPU at one time in a call, beyond what was there before it."""
    work()  # what is allocated once and kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def seconds(work: Work) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def wall_ratio(ours: Work, peer: Work, pairs: int) -> dict:
    """Ratio of wall times from interleaved pairs, the order alternating: geometric mean with a 95 % t interval.

    Quick calls have more pairs than asked for, up to :data:`MORE` times as many, while they take less than
    :data:`ROOM` together: what interrupts a call weighs more, the shorter it is.
    """
    ours(), peer()  # the first call allocates
    logs, started = [], time.perf_counter()
    for pair in range(MORE * pairs):
        if pair >= pairs and time.perf_counter() - started > ROOM:
            break
        both = (ours, peer) if pair % 2 == 0 else (peer, ours)
        times = [seconds(work) for work in both]
        mine, theirs = times if pair % 2 == 0 else times[::-1]
        logs.append((np.log(mine), np.log(theirs)))
    table = np.array(logs)
    interval = t_interval(table[:, 0] - table[:, 1])
    ratio, low, high = (float(np.exp(x)) for x in (interval.mean, interval.low, interval.high))
    medians = np.exp(np.median(table, axis=0))
    return {
        "ours": float(medians[0]),
        "peer": float(medians[1]),
        "ratio": ratio,
        "low": low,
        "high": high,
        "n": len(logs),
        "unit": "s",
    }


def counted_ratio(ours: float, peer: float, unit: str) -> dict:
    """A ratio of two counts."""
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit}


def judged(name: str, target: float | None, measured: dict, least: int = PAIRS) -> dict:
    """A row with its target: met when the ratio is at most the target, a timed one by its upper bound. It is also said
    on stderr, since a whole table takes long.

    Neither met nor missed (None) where there is no target, or where a time has fewer than ``least`` pairs.
    """
    decides = target is not None and measured.get("n", least) >= least
    reached = measured.get("high", measured["ratio"]) <= target if decides else None
    print(f"{name}: {measured['ratio']:.3f}, target {target}, met {reached}", file=sys.stderr, flush=True)
    return {"name": name, **measured, "target": target, "met": reached}


def circumstances(command: str, packages: Sequence[str] = PACKAGES) -> dict:
    """What every row carries: versions, processor, threads and the command."""
    return {
        "versions": {name: version(name) for name in packages},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "command": command,
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def publish(
    rows: Sequence[dict], file: str, command: str, packages: Sequence[str] = PACKAGES, whole: bool = True
) -> None:
    """Print the rows as a table, and write those of a whole run to ``results/<file>`` and into the page of all
    benchmarks: a run of fewer pairs or cases does not take a whole one's place.
    """
    if whole:
        _keep([{**row, **circumstances(command, packages)} for row in rows], file)
    else:
        print(f"a part of the benchmark: {file} stays as it is", file=sys.stderr)
    print(f"{'measured':<66} {'ours':>12} {'peer':>12} {'ratio':>18} {'target':>7}  met")
    for row in rows:
        bounds = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        target = "–" if row["target"] is None else f"≤ {row['target']:.3g}"
        met = {None: "stated", True: "yes", False: "NO"}[row["met"]]
        ratio = f"{row['ratio']:.3f}{bounds}"
        print(f"{row['name']:<66} {row['ours']:>12.4g} {row['peer']:>12.4g} {ratio:>22} {target:>7}  {met}")


def _keep(rows: Sequence[dict], file: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / file, json.dumps(rows, indent=1) + "\n")
    start, end = f"<!-- {file} -->", f"<!-- /{file} -->"
    before, _, rest = PAGE.read_text().partition(start)
    write_atomically(PAGE, f"{before}{start}\n\n{as_markdown(rows)}\n\n{end}{rest.partition(end)[2]}")


def as_markdown(rows: Sequence[dict]) -> str:
    """The rows as a table, with what they were measured on."""
    lines = ["| measured | ours | peer | unit | ratio | target | met |", "|---" * 7 + "|"]
    for row in rows:
        bounds = f" [{row['low']:.3f}, {row['high']:.3f}], n = {row['n']}" if "low" in row else ""
        target = "–" if row["target"] is None else f"≤ {row['target']:.3g}"
        met = {None: "stated", True: "yes", False: "no"}[row["met"]]
        numbers = f"{_number(row['ours'])} | {_number(row['peer'])} | {row['unit']} | {row['ratio']:.3f}{bounds}"
        lines.append(f"| {row['name']} | {numbers} | {target} | {met} |")
    first = rows[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    about = f"`{first['command']}`, {first['processor']}, threads: {first['threads']}; {versions}."
    return "\n".join([about, "", *lines])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
