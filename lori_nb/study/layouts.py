"""Whole figures: panels arranged, with their titles and one legend, as notebooks and committed results show them.

Each function takes tidy tables and returns a matplotlib ``Figure``; what a panel holds is drawn by
:mod:`lori_nb.study.figures` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from lori_nb.study import (
    conflict,
    figures,
    figures_joint,
    figures_lori,
    figures_merging,
    figures_sequences,
    functional,
    geometry,
    mergeability,
)
from lori_nb.study.sequences import JOINT
from lori_nb.study.style import GREY, title_of
from lori_nb.study.summary import n_text


def single(draw: Callable, *arguments: object, height: float = 3.2) -> Figure:
    """One panel, drawn by ``draw(ax, *arguments)``, with its legend below."""
    figure, (ax,) = figures.panels(1, height=height)
    draw(ax, *arguments)
    figures.shared_legend(figure)
    return figure


def forest(table: pd.DataFrame, seeds: pd.DataFrame, against: str = "tuned LoRA") -> Figure:
    """Differences to what ``against`` names, of :func:`lori_nb.study.comparison.compared`, with those of single seeds
    as dots.
    """
    return single(figures_lori.forest, table, seeds, against, height=figures_lori.forest_height(table))


def cost(table: pd.DataFrame, *costs: str) -> Figure:
    """Score against each of some costs, keys of :data:`lori_nb.study.figures_lori.COST_LABELS`."""
    figure, axes = figures.panels(len(costs))
    for ax, name in zip(axes, costs, strict=True):
        figures_lori.score_against_cost(ax, table, name)
    figures.shared_legend(figure)
    return figure


def sparsity(scores: pd.DataFrame, losses: pd.DataFrame | None = None) -> Figure:
    """Score against sparsity, a panel a task, and the training losses beside them where they are given."""
    tasks = list(dict.fromkeys(scores["task"]))
    figure, axes = figures.panels(len(tasks) + (losses is not None))
    for ax, task in zip(axes[: len(tasks)], tasks, strict=True):
        figures.score_against_sparsity(ax, scores[scores["task"] == task])
    if losses is not None:
        figures.loss_curves(axes[-1], losses)
    figures.shared_legend(figure)
    return figure


def recovery(table: pd.DataFrame) -> Figure:
    """Share of the gap between joint and single-task training that each way wins back."""
    return single(figures_joint.recovery, table, height=1.2 + 0.5 * table["task"].nunique())


def conflict_map(cells: pd.DataFrame) -> Figure:
    """Mean cosine between tasks by step and layer, A and B apart."""
    figure, axes = figures.panels(2, height=3.2)
    figures_joint.conflict_map(axes, cells)
    return figure


def task_cosines(pairs: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Mean cosine between every two tasks' half batches; table of :func:`lori_nb.study.conflict.by_tasks`."""
    figure, (ax,) = figures.panels(1, columns=2, height=2.9)
    matrix = {"cosine, joint training": conflict.matrix_of(pairs, tasks)}
    figures.heat_maps([ax], matrix, "cosine of half batches' gradients", ".3f")
    return figure


def overlap_maps(overlaps: pd.DataFrame, measure: str) -> Figure:
    """One measure of every pair of tasks, a heat map a method and a null."""
    names = list(dict.fromkeys(overlaps["method"]))
    matrices = {title_of(name): 100 * geometry.overlap_matrix(overlaps, name, measure) for name in names}
    figure, axes = figures.panels(len(names), columns=len(names) // 2, height=2.4)
    figures.heat_maps(axes, matrices, f"{figures.MEASURE_LABELS[measure]} (%)", figures.MEASURE_FORMS[measure])
    return figure


def angles(table: pd.DataFrame) -> Figure:
    """Spectra of principal angles, what adapters read and what they write apart."""
    figure, axes = figures.panels(len(geometry.SIDES))
    for ax, (side, title) in zip(axes, geometry.SIDES.items(), strict=True):
        figures.spectra(ax, table[table["side"] == side]).set_title(title)
    figures.shared_legend(figure)
    return figure


def moved_activations(table: pd.DataFrame) -> Figure:
    """How far each task's adapter moves another task's activations, a heat map a method."""
    names = list(dict.fromkeys(table["method"]))
    matrices = {title_of(name): functional.functional_matrix(table[table["method"] == name]) for name in names}
    figure, axes = figures.panels(len(names), columns=3, height=2.6)
    figures.heat_maps(axes, matrices, "‖ΔWⱼ x‖ / ‖ΔWᵢ x‖")
    figure.supxlabel("adapter j", fontsize=9)
    figure.supylabel("activations of task i", fontsize=9)
    return figure


def depth(places: pd.DataFrame, measure: str) -> Figure:
    """A measure by layer, a line a kind of module, beside its null, a panel a method."""
    chosen = places[places["measure"] == measure]
    names = list(dict.fromkeys(chosen["method"]))
    figure, axes = figures.panels(len(names), columns=1, height=2.4)
    for ax, name in zip(axes, names, strict=True):
        figures.by_depth(ax, chosen[chosen["method"] == name]).set_title(title_of(name))
        ax.set_ylabel(figures.MEASURE_LABELS[measure])
    figures.shared_legend(figure)
    return figure


def overlap_by_choice(table: pd.DataFrame) -> Figure:
    """Overlap under every draw of A and structure of masks, a panel a measure."""
    figure, axes = figures.panels(len(figures.MEASURE_LABELS), height=0.9 + 0.16 * table["method"].nunique())
    figures_lori.overlap_by_choice(axes, table)
    figures.shared_legend(figure)
    return figure


def merge_weights(merged: pd.DataFrame, alone: pd.DataFrame, chosen: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Score against weight, a panel a way to merge: tables of :mod:`lori_nb.study.questions`."""
    ways = list(dict.fromkeys(merged["merge"]))
    figure, axes = figures.panels(len(ways), height=2.8 if len(ways) <= 3 else 2.6)
    for ax, way in zip(axes, ways, strict=True):
        figures_merging.score_and_choice(ax, merged[merged["merge"] == way], alone, chosen, paper)
    figures.shared_legend(figure)
    return figure


def merge_scaling(table: pd.DataFrame) -> Figure:
    """Mean and worst task of merges against the number of adapters."""
    figure, axes = figures.panels(2, height=2.8)
    for ax, measure in zip(axes, ("mean", "worst"), strict=True):
        figures_merging.scaling(ax, table, measure)
    figures.shared_legend(figure)
    return figure


def loss_against_overlap(pairs: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """What a merge costs against how two adapters meet, a panel a measure."""
    figure, axes = figures.panels(len(mergeability.SHOWN), columns=3, height=2.4)
    for ax, measure in zip(axes, mergeability.SHOWN, strict=True):
        figures_merging.loss_against_overlap(ax, pairs, correlations, measure)
    figure.suptitle(figures_merging.correlation_title(correlations), fontsize=9)
    figures.shared_legend(figure)
    return figure


def accuracy_matrices(matrices: Mapping[str, pd.DataFrame], note: str) -> Figure:
    """Scores on every task after every stage, a heat map a way; ``note`` says what they are means of."""
    if not matrices:
        return single(figures.nothing)
    many = len(matrices) > 4
    figure, axes = figures.panels(len(matrices), columns=3 if many else None, height=2.0 if many else 2.6)
    figures.heat_maps(axes, matrices, f"score ({note})")
    return figure


def lost(table: pd.DataFrame) -> Figure:
    """What earlier tasks lost under every way."""
    if table.empty:
        return single(figures.nothing)
    figure, (ax,) = figures.panels(1)
    figures.grouped_points(ax, table.assign(all="all earlier tasks"), "all", "way", "score lost")
    ax.set_title(n_text(table))
    ax.axhline(0, color=GREY, linewidth=0.8)
    figures.shared_legend(figure)
    return figure


def course(table: pd.DataFrame) -> Figure:
    """The first task's score and the new one's while the second task trains."""
    figure, axes = figures.panels(2)
    for ax, role in zip(axes, ("old", "new"), strict=True):
        figures_sequences.scores_by_step(ax, table, role)
    figures.shared_legend(figure)
    return figure


def orders(table: pd.DataFrame) -> Figure:
    """Score after the last task in every order, ways from task to task side by side; a line for joint training."""
    joint = table.loc[table["way"] == JOINT, "value"].tolist()
    return single(figures_sequences.score_by_order, table[table["way"] != JOINT], joint, height=3.6)


def capacity(table: pd.DataFrame, fits: int) -> Figure:
    """Score of the n-th task under disjoint masks; ``fits`` is the number of the last one that fits."""
    return single(figures_sequences.score_of_nth_task, table, fits, height=3.4)
