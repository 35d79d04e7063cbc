"""What a long measurement leaves of overlaps, and of what the draw of A and the structure of masks buy.

Overlaps need the adapters, which the ledger does not keep: they are computed where the runs are in the store, and stay
as they were written elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lori_nb.study import comparison, figures, figures_lori, foreign, functional, geometry
from lori_nb.study.notebook import Results
from lori_nb.study.plans import method_specs
from lori_nb.study.style import title_of
from lori_nb.study.summary import markdown, readable

MEASURES = tuple(figures.MEASURE_LABELS)
BOUNDS = ["value", "low", "high"]


def tables(results: Results, here: Results) -> dict[str, pd.DataFrame]:
    """What choices buy, and overlaps once every method's adapters of all tasks and seeds are there.

    Args:
        results: scores of the ledger.
        here: the same notebook's runs in the store, with their adapters.
    """
    found = {"choices": comparison.bought(results)}
    if all(here.run(spec) is not None for spec in method_specs(here.settings)):
        overlaps = geometry.overlaps(here)
        pair = ["method", "measure", "adapter_a", "adapter_b"]
        magnitudes = overlaps.assign(value=overlaps["value"].abs())
        found["overlap_pairs"] = magnitudes.groupby(pair, sort=False)["value"].mean().reset_index()
        found["overlap"] = pd.concat([geometry.overlap_summary(overlaps), geometry.seed_summary(here)])
        found["overlap_choices"] = geometry.overlap_summary(geometry.overlaps(here, geometry.choice_sets))
        found["angles"] = geometry.angle_spectra(here)
        found["mask_overlap"] = geometry.mask_overlaps(here)
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
    makers = {f"overlap_{measure}": lambda measure=measure: _heat_maps(pairs, measure) for measure in MEASURES}
    makers["angles"] = lambda: _angles(found["angles"])
    makers["functional"] = lambda: _functional(found["functional"])
    makers |= {
        f"depth_{measure}": lambda measure=measure: _depth(found["overlap_places"], measure) for measure in MEASURES
    }
    makers["overlap_choices"] = lambda: _choices(found["overlap_choices"])
    return makers


def _heat_maps(pairs: pd.DataFrame, measure: str):
    names = list(dict.fromkeys(pairs["method"]))
    matrices = {title_of(name): 100 * geometry.overlap_matrix(pairs, name, measure) for name in names}
    figure, axes = figures.panels(len(names), columns=len(names) // 2, height=2.1)
    figures.heat_maps(axes, matrices, f"{figures.MEASURE_LABELS[measure]} (%)", figures.MEASURE_FORMS[measure])
    return figure


def _angles(angles: pd.DataFrame):
    figure, axes = figures.panels(len(geometry.SIDES))
    for ax, (side, title) in zip(axes, geometry.SIDES.items(), strict=True):
        figures.spectra(ax, angles[angles["side"] == side]).set_title(title)
    figures.shared_legend(figure)
    return figure


def _functional(moved: pd.DataFrame):
    names = list(dict.fromkeys(moved["method"]))
    figure, axes = figures.panels(len(names), columns=3, height=2.6)
    matrices = {title_of(name): functional.functional_matrix(moved, name) for name in names}
    figures.heat_maps(axes, matrices, "‖ΔWⱼ x‖ / ‖ΔWᵢ x‖")
    figure.supxlabel("adapter j", fontsize=9)
    figure.supylabel("activations of task i", fontsize=9)
    return figure


def _depth(places: pd.DataFrame, measure: str):
    """A panel a method: a measure by layer, a line a kind of module, beside its null."""
    chosen = places[places["measure"] == measure]
    names = list(dict.fromkeys(chosen["method"]))
    figure, axes = figures.panels(len(names), columns=1, height=2.1)
    for ax, name in zip(axes, names, strict=True):
        foreign.by_depth(ax, chosen[chosen["method"] == name]).set_title(title_of(name))
        ax.set_ylabel(figures.MEASURE_LABELS[measure])
    figures.shared_legend(figure)
    return figure


def _choices(table: pd.DataFrame):
    figure, axes = figures.panels(len(MEASURES), height=0.9 + 0.16 * table["method"].nunique())
    figures_lori.overlap_by_choice(axes, table)
    figures.shared_legend(figure)
    return figure


def text(folder: Path) -> str:
    """README's part, as Markdown, of the tables in ``folder``; empty where there are none."""
    parts = []
    if (folder / "overlap.csv").exists():
        means = pd.read_csv(folder / "overlap.csv")
        means[BOUNDS] *= 100
        table = readable(means.replace({"measure": figures.MEASURE_LABELS}), "method", "measure")
        parts += ["Overlap of two tasks' adapters in percent, mean over modules and pairs of tasks:", markdown(table)]
    masks = folder / "mask_overlap.csv"
    words = geometry.summary_lines(pd.read_csv(masks)) if masks.exists() else []
    if (folder / "functional.csv").exists():
        words += functional.functional_lines(pd.read_csv(folder / "functional.csv"))
    parts += [" ".join(words)] if words else []
    if (folder / "choices.csv").exists():
        parts += [
            "What the draw of A and the structure of masks buy, on the tasks of the arms; the merge is the plain sum:",
            markdown(readable(pd.read_csv(folder / "choices.csv"), "arm", "measure", 3)),
        ]
    return "\n\n".join(parts)
