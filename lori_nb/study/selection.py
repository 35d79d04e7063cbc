"""Some of a study's runs, trained by this process or by all that torchrun has started; notebooks find them done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lori_nb.lab import distributed
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import Spec
from lori_nb.study.cost import cost_of
from lori_nb.study.display import Display


def selected(
    specs: Sequence[Spec], methods: Sequence[str] = (), tasks: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Spec]:
    """Those of a plan with one of the methods and seeds that are trained on none but the tasks; empty means any.

    ValueError names a choice that no run of the plan has.
    """
    wanted = {"method": (methods, _method), "task": (tasks, _tasks), "seed": (seeds, _seed)}
    for name, (chosen, values_of) in wanted.items():
        known = sorted({value for spec in specs for value in values_of(spec)})
        for value in chosen:
            if value not in known:
                raise ValueError(f"{name} must be one of the plan's, {', '.join(map(str, known))}; found {value!r}")
    fits = [(set(chosen), values_of) for chosen, values_of in wanted.values() if chosen]
    return [spec for spec in specs if all(values_of(spec) <= chosen for chosen, values_of in fits)]


def _method(spec: Spec) -> set[str]:
    return {spec.method}


def _tasks(spec: Spec) -> set[str]:
    return set(spec.tasks)


def _seed(spec: Spec) -> set[int]:
    return {spec.seed}


def train_each(specs: Sequence[Spec], say: Callable[[str], None], store: Store | None = None) -> int:
    """Carry out every spec that is not finished, with its parents, one after another; returns how many were asked for.

    Under torchrun every process calls this with the same specs; the main one shows progress and speaks.
    """
    store = store or Store()
    display = Display(len(specs)) if distributed.is_main() else None
    for spec in specs:

        def report(stage: str, done: int, total: int, spec: Spec = spec) -> None:
            display.update(spec.label, spec.label, stage, done, total, cost_of(spec).seconds)

        store.get(spec, report)
        if display is not None:
            display.finish(spec.label)
    if distributed.is_main():
        say(f"done: {len(specs)} runs and those they build on, in {store.root}")
    return len(specs)
