"""What a long measurement leaves of overlaps, and of what the draw of A and the structure of masks buy.

Overlaps need the adapters, which the ledger does not keep: they are computed where the runs are in the store, and stay
as they were written elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.study import comparison, figures, functional, geometry, layouts
from lori_nb.study.notebook import Results, collect
from lori_nb.study.overlap_references import every_overlap, means_and_references
from lori_nb.study.plans import method_specs
from lori_nb.study.summary import SIGNIFICANT, markdown, readable

MEASURES = tuple(figures.MEASURE_LABELS)
BOUNDS = ["value", "low", "high"]


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """What choices buy, by the ledger, and overlaps where every method's adapters of all tasks and seeds are in the
    store.
    """
    found = {"choices": comparison.bought(results)}
    here = collect(results.name, results.settings, train=False)
    if all(here.run(spec) is not None for spec in method_specs(here.settings)):
        every = every_overlap(here)
        overlaps = every[every["measure"].isin(MEASURES)]
        pair = ["method", "measure", "adapter_a", "adapter_b"]
        magnitudes = overlaps.assign(value=overlaps["value"].abs())
        found["overlap_pairs"] = magnitudes.groupby(pair, sort=False)["value"].mean().reset_index()
        found["overlap"] = means_and_references(every, here)
        found["overlap_choices"] = geometry.overlap_summary(geometry.overlaps(here, geometry.choice_sets))
        found["angles"] = geometry.angle_spectra(here)
        found["mask_overlap"] = geometry.mask_overlaps(every, here)
        found["overlap_places"] = geometry.overlap_places(overlaps)
        moved = functional.functional_interference(here)
        keys = ["method", "seed", "task", "adapter"]
        found["functional"] = moved.groupby(keys, sort=False)[["value", "null"]].mean().reset_index()
    return {name: table for name, table in found.items() if len(table)}


def drawn(results: Results, found: dict[str, pd.DataFrame]) -> dict[str, Callable]:
    """Name → what draws it, of the tables that there are."""
    if "overlap" not in found:
        return {}
    pairs = found["overlap_pairs"]
    makers = {f"overlap_{name}": lambda name=name: layouts.overlap_maps(pairs, name) for name in MEASURES}
    makers |= {f"depth_{name}": lambda name=name: layouts.depth(found["overlap_places"], name) for name in MEASURES}
    makers["functional"] = lambda: layouts.moved_activations(found["functional"])
    makers["angles"] = lambda: layouts.angles(found["angles"])
    makers["overlap_choices"] = lambda: layouts.overlap_by_choice(found["overlap_choices"])
    return makers


def headline(folder: Path) -> str:
    """README's part, as Markdown, of the tables in ``folder``; empty where there is none of overlaps."""
    if not (folder / "overlap.csv").exists():
        return ""
    means = pd.read_csv(folder / "overlap.csv")
    means = means[means["measure"].isin(MEASURES)]
    means[BOUNDS] *= 100
    table = readable(means.replace({"measure": figures.MEASURE_LABELS}), "method", "measure")
    parts = ["Overlap of two tasks' adapters in percent, mean over modules and pairs of tasks:", markdown(table)]
    masks = folder / "mask_overlap.csv"
    words = geometry.summary_lines(pd.read_csv(masks)) if masks.exists() else []
    if (folder / "functional.csv").exists():
        words += functional.functional_lines(pd.read_csv(folder / "functional.csv"))
    return "\n\n".join([*parts, " ".join(words)] if words else parts)


def text(folder: Path) -> str:
    """The same with what choices buy, for the page of all tables."""
    parts = [words] if (words := headline(folder)) else []
    means = pd.read_csv(folder / "overlap.csv") if parts else pd.DataFrame({"measure": []})
    if len(others := means[~means["measure"].isin(MEASURES)]):
        every = readable(others, "measure", "method", SIGNIFICANT)
        parts += ["The other measures, each in its own unit (`lori_nb.analysis`):", markdown(every)]
    if (folder / "choices.csv").exists():
        parts += [
            "What the draw of A and the structure of masks buy, on the tasks of the arms; the merge is the plain sum:",
            markdown(readable(pd.read_csv(folder / "choices.csv"), "arm", "measure", 3)),
        ]
    return "\n\n".join(parts)
