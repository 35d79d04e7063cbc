"""A step of Ortho-LoRA against joint training, against a loop over the tasks, and against torchjd.

T tasks of like length share one adapter: MiniLM with adapters on query and value (r = 8) and a head a task, or
SmolLM2-135M with adapters on all linear modules of its last 8 layers, below which hidden states are cached, or of all
30 (r = 16). Everything is measured with two rows of a task a step, where what does not grow with rows weighs most; the
step at four tasks also with the eight that studies take, and on all layers. Every side takes the same rows, clips and
steps AdamW. *Joint* sends one batch forward and backward. *Ours* does so too, takes every task's
gradient out of that backward pass, projects, and records how the gradients conflict. The *loop* has a forward and a
backward pass a task, with the same projection. *torchjd* has one forward pass, ``mtl_backward`` and its PCGrad for
every tensor, on peft's LoRA.

    python benchmarks/ortho.py --pairs 30
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import PAIRS, counted_ratio, flops, judged, peak_bytes, publish, wall_ratio
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torchjd.aggregation import PCGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from lori_nb.lab.evaluation import states_at, task_loss
from lori_nb.lab.gradients import TaskData, concatenated, of_like_length
from lori_nb.lab.methods import fresh_factors
from lori_nb.lab.models import Base, load_base
from lori_nb.lab.prefix import cached_states, split_at, suffix_body
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import Example, get_task
from lori_nb.lab.telemetry import LOOKS, Telemetry
from lori_nb.lab.text import Encoded, encode_decoder_rows, encode_encoder_rows
from lori_nb.lab.training import Loop
from lori_nb.method.adapters import LowRank, attach, target_linears
from lori_nb.method.conflicts import combine, combine_stacked

MODELS = {
    "MiniLM, q and v": {"base": "all-minilm-l6-v2", "modules": "query,value", "rank": 8, "last_layers": None},
    "SmolLM2, last 8 layers": {"base": "smollm2-135m-instruct", "modules": "all-linear", "rank": 16, "last_layers": 8},
    "SmolLM2, all layers": {"base": "smollm2-135m-instruct", "modules": "all-linear", "rank": 16, "last_layers": None},
}
MOST_TASKS = 8
NUMBERS = (2, 4, MOST_TASKS)  # of tasks
ROWS = 2  # of a task, a step
STUDY_ROWS = 8  # of a task, a step of the studies
CANDIDATES = 8 * ROWS * MOST_TASKS  # rows, of which those alike in length are taken
EVERYTHING = ("flops", "joint", "loop", "torchjd", "peak", "telemetry")


@dataclass(frozen=True)
class Case:
    """A model, a number of tasks, rows of each a step, and what is measured of them."""

    model: str
    tasks: int
    rows: int = ROWS
    measures: tuple[str, ...] = EVERYTHING

    @property
    def name(self) -> str:
        return f"{self.model}, T = {self.tasks}" + ("" if self.rows == ROWS else f", {self.rows} rows a task")


def cases(tasks: Sequence[int]) -> list[Case]:
    """Everything with few rows; at four tasks also the step with as many rows as studies take, and on all layers."""
    encoder, decoder, deep = MODELS
    found = [Case(model, number) for model in (encoder, decoder) for number in tasks]
    if 4 in tasks:
        found += [Case(model, 4, STUDY_ROWS, ("flops", "joint", "loop")) for model in (encoder, decoder)]
        found += [Case(deep, 4, ROWS, ("flops", "joint", "torchjd", "peak"))]
    return found


CLIP, RATE = 1.0, 1e-6


@dataclass
class Setting:
    """A base, T tasks with their rows, and the run that describes the step."""

    base: Base
    body: nn.Module
    tasks: list[TaskData]
    spec: RunSpec

    @property
    def parts(self) -> list[tuple[TaskData, list[int]]]:
        """Every task's rows of a step."""
        return [(task, list(range(len(task.rows)))) for task in self.tasks]


def setting_of(case: Case, dtype: str) -> Setting:
    """Task t has the t-th few of the same rows for every number of tasks. These are alike in length, so that all tasks
    share one backward pass and padding is no part of the ratios.
    """
    about, size = MODELS[case.model], case.rows * case.tasks
    base = copy.deepcopy(load_base(about["base"], dtype))
    names = tuple(f"task {number}" for number in range(case.tasks))
    spec = RunSpec("ortho-lora", names, alpha=2.0 * about["rank"], learning_rate=RATE, batch_size=size, **about)
    first, data, rows = split_at(base, spec.last_layers), [], rows_of_like_length(base, max(size, ROWS * MOST_TASKS))
    for number, name in enumerate(names):
        encoded = rows[number * case.rows : (number + 1) * case.rows]
        if base.kind == "decoder":
            data.append(TaskData(name, encoded, cached_states(base, encoded, first) if first else None))
        else:
            data.append(TaskData(name, encoded, None, nn.Linear(base.width, 2)))
    if len(passes := of_like_length([[len(row.ids) for row in task.rows] for task in data])) > 1:
        raise ValueError(f"tasks must be of like length, for one backward pass; found {len(passes)} passes")
    return Setting(base, suffix_body(base, first), data, spec)


def rows_of_like_length(base: Base, count: int) -> list[Encoded]:
    """So many rows: among those that differ least in length, those nearest to middling."""
    rows = get_task("family_relationships").rows("train", CANDIDATES)
    if base.kind == "decoder":
        encoded = encode_decoder_rows(base.tokenizer, rows)
    else:
        asked = [Example(row.prompt, answer="", target=place % 2) for place, row in enumerate(rows)]
        encoded = encode_encoder_rows(base.tokenizer, asked)
    ordered = sorted(encoded, key=lambda row: len(row.ids))
    last = len(ordered) - count

    def spread_and_place(start: int) -> tuple[int, float]:
        return len(ordered[start + count - 1].ids) - len(ordered[start].ids), abs(start - last / 2)

    start = min(range(last + 1), key=spread_and_place)
    return ordered[start : start + count]


def low_rank(setting: Setting) -> dict[str, LowRank]:
    """Factors on the setting's modules, in place, with a B away from zero as in the midst of training."""
    linears = target_linears(setting.base.body, setting.spec.modules, setting.spec.last_layers)
    factors = fresh_factors(setting.spec, {name: tuple(m.weight.shape) for name, m in linears.items()})
    live = {name: LowRank(f, train_A=True) for name, f in factors.items()}
    with torch.no_grad():
        for low in live.values():
            low.values.add_(torch.linspace(-0.01, 0.01, low.values.numel()).view_as(low.values))
    attach(setting.base.body, live)
    return live


def losses_of(setting: Setting, states: Tensor, batch) -> list[Tensor]:
    """Each task's mean loss, from the states that the heads read; the tasks share nothing above the states."""
    decoder = setting.base.kind == "decoder"
    ends = [task.targets(rows) if decoder else len(rows) for task, rows in setting.parts]
    return [
        task_loss(setting.base, (setting.base.head if decoder else task.head)(own).float(), targets)
        for (task, _), own, targets in zip(setting.parts, states.split(ends), batch.targets.split(ends), strict=True)
    ]


def ours(setting: Setting, telemetry: bool = True, looks: bool = False) -> Callable[[], None]:
    """The kit's own step as training takes it, with its record of conflicts; ``looks`` splits the batches in halves, as
    :data:`LOOKS` steps of a run do.
    """
    loop = Loop(setting.spec, setting.base, setting.body, low_rank(setting), setting.tasks)
    tasks = loop.telemetry.tasks

    def step() -> None:
        loop.telemetry = Telemetry(tasks) if telemetry else None  # a record of one step does not grow
        loop.step(0 if looks else 1)

    return step


def joint(setting: Setting) -> Callable[[], None]:
    """One batch, the mean of the tasks' losses, one backward pass."""
    live = low_rank(setting)
    parameters = _parameters(setting, [p for low in live.values() for p in low.trained().values()])
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step() -> None:
        batch = concatenated(setting.base, setting.parts)
        losses = losses_of(setting, states_at(setting.base, setting.body, batch), batch)
        _take(optimiser, parameters, torch.autograd.grad(sum(losses) / len(losses), parameters))

    return step


def loop(setting: Setting) -> Callable[[], None]:
    """A forward and a backward pass for every task on its own rows, then the same projection."""
    live = low_rank(setting)
    named = {f"{module}.{part}": p for module, low in live.items() for part, p in low.trained().items()}
    parameters = _parameters(setting, list(named.values()))
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step() -> None:
        gradients, heads = [], []
        for task, rows in setting.parts:
            batch = concatenated(setting.base, [(task, rows)])
            states = states_at(setting.base, setting.body, batch)
            scores = setting.base.head(states).float() if task.head is None else task.head(states)
            own = [] if task.head is None else list(task.head.parameters())
            loss = task_loss(setting.base, scores, batch.targets)
            found = torch.autograd.grad(loss, [*named.values(), *own])
            gradients.append(dict(zip(named, found[: len(named)], strict=True)))
            heads += found[len(named) :]
        combined, _ = combine(gradients, reduction="mean", generator=torch.Generator().manual_seed(1))
        _take(optimiser, parameters, [*combined.values(), *heads])

    return step


def torchjd(setting: Setting, chunk: int | None) -> Callable[[], None]:
    """torchjd's Jacobian of all losses at once (``chunk`` losses at a time), aggregated tensor by tensor."""
    names = list(target_linears(setting.base.body, setting.spec.modules, setting.spec.last_layers))
    config = LoraConfig(r=setting.spec.rank, lora_alpha=setting.spec.alpha, target_modules=names, lora_dropout=0.0)
    body = inject_adapter_in_model(config, setting.base.body).eval()
    shared = [p for p in body.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in shared:
            p.add_(torch.linspace(-0.01, 0.01, p.numel()).view_as(p))
    heads = [[] if task.head is None else list(task.head.parameters()) for task in setting.tasks]
    parameters = _parameters(setting, shared)
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step() -> None:
        batch = concatenated(setting.base, setting.parts)
        states = states_at(setting.base, setting.body, batch)
        losses = losses_of(setting, states, batch)
        mtl_backward(losses, states, tasks_params=heads, shared_params=shared, parallel_chunk_size=chunk)
        for parameter in shared:
            jac_to_grad([parameter], PCGrad())
        _take(optimiser, parameters, [p.grad for p in parameters])

    return step


def _parameters(setting: Setting, shared: list[nn.Parameter]) -> list[nn.Parameter]:
    return shared + [p for task in setting.tasks if task.head is not None for p in task.head.parameters()]


def _take(optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def adapter_bytes(setting: Setting) -> int:
    """Bytes of one gradient of the adapter, float32."""
    linears = target_linears(setting.base.body, setting.spec.modules, setting.spec.last_layers)
    return 4 * setting.spec.rank * sum(m.in_features + m.out_features for m in linears.values())


STEP_TARGETS = {4: 1.05, 8: 1.10}
FINE = 3  # times as many pairs where two per cent are asked about
STEPS = (240, 120)  # of runs, LOOKS of which look at halves: of profile standard, and of the shorter quick
TORCHJD_TARGETS = {4: 1.8, 8: 3.0}


def step_rows(case: Case, dtype: str, pairs: int) -> list[dict]:
    """What is asked of one model and one number of tasks."""

    def fresh() -> Setting:
        return setting_of(case, dtype)

    mine, plain, asked, name, rows = ours(fresh()), joint(fresh()), set(case.measures), case.name, []
    if "flops" in asked:
        counts = counted_ratio(flops(mine), flops(plain), "FLOPs")
        rows.append(judged(f"{name}: step, ours / joint", 1.02 if case.tasks == 8 else None, counts))
    if "joint" in asked:
        rows.append(judged(f"{name}: step, ours / joint", STEP_TARGETS.get(case.tasks), wall_ratio(mine, plain, pairs)))
    if "loop" in asked:
        rows.append(judged(f"{name}: step, ours / loop over tasks", 1.0, wall_ratio(mine, loop(fresh()), pairs)))
    if "torchjd" in asked:
        quick = faster([torchjd(fresh(), chunk) for chunk in (None, 1)])
        least = TORCHJD_TARGETS.get(case.tasks)
        rows.append(judged(f"{name}: step, ours / torchjd", least and 1 / least, wall_ratio(mine, quick, pairs)))
    if "peak" in asked:
        peaks = peak_bytes(mine), peak_bytes(plain)
        allowed = (peaks[1] + (case.tasks + 1) * adapter_bytes(fresh()) + 0.05 * peaks[1]) / peaks[1]
        rows.append(judged(f"{name}: peak allocated, ours / joint", allowed, counted_ratio(*peaks, "bytes")))
    if "telemetry" in asked:
        silent = ours(fresh(), telemetry=False)
        usual, looking = (wall_ratio(each, silent, FINE * pairs) for each in (mine, ours(fresh(), looks=True)))
        rows.append(judged(f"{name}: step that looks at halves, telemetry on / off", None, looking))
        for steps in STEPS:
            ratio = mixed(usual, looking, LOOKS / steps)
            rows.append(judged(f"{name}: {steps} steps, telemetry on / off", 1.03, ratio))
    return rows


def faster(ways: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """The way whose median of three calls is the least."""
    return min(ways, key=lambda work: wall_ratio(work, work, 3)["ours"])


def mixed(usual: dict, seldom: dict, share: float) -> dict:
    """The ratio over steps of which a share are of the second kind; bounds are those of both kinds together."""
    both = {key: (1 - share) * usual[key] + share * seldom[key] for key in ("ours", "peer", "ratio", "low", "high")}
    return usual | both


def projection_rows(pairs: int) -> list[dict]:
    """The projection alone, on 48 tensors of T = 8 tasks."""
    rows, draw = [], torch.Generator().manual_seed(0)
    for shape, target in (((8, 384), 1 / 15), ((16, 720), None), ((16, 1536), None)):
        tensors = {f"{i}.B": torch.randn(8, *shape, generator=draw) for i in range(48)}
        jacobians = [each.flatten(1) for each in tensors.values()]
        generator = torch.Generator().manual_seed(1)

        def mine(tensors=tensors, generator=generator) -> None:
            combine_stacked(tensors, generator=generator)

        def peer(jacobians=jacobians) -> None:
            for jacobian in jacobians:
                PCGrad()(jacobian)

        name = f"projection alone, 48 tensors of {shape[0]} × {shape[1]}, T = 8, ours / torchjd"
        rows.append(judged(name, target, wall_ratio(mine, peer, pairs)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"interleaved pairs of every timing; {PAIRS} are judged"
    )
    parser.add_argument("--dtype", default="auto", help="of the frozen base, on all sides")
    parser.add_argument("--tasks", type=int, nargs="*", default=NUMBERS, help=f"at most {MOST_TASKS}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = projection_rows(arguments.pairs)
    for case in cases(arguments.tasks):
        rows += step_rows(case, arguments.dtype, arguments.pairs)
    asked = " ".join(map(str, arguments.tasks))
    command = f"python benchmarks/ortho.py --pairs {arguments.pairs} --dtype {arguments.dtype} --tasks {asked}"
    whole = arguments.pairs >= PAIRS and set(NUMBERS) <= set(arguments.tasks)
    publish(rows, "ortho.json", command, ("torch", "transformers", "peft", "torchjd"), whole)


if __name__ == "__main__":
    main()
