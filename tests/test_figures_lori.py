"""Figures of LoRI beside LoRA: they return their axes, clip and cover nothing, and show what the tables say."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lori_nb.study import figures, figures_lori, style

ARMS = {"lori-d": "LoRI-D", "lori-s": "LoRI-S", "lora-longer": "LoRA, twice the steps"}
TASKS = ("family_relationships", "word_sequence_reversal", "mean over tasks")
MEANS = {"lori-d": -0.04, "lori-s": 0.004, "lora-longer": 0.01}


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context():
        style.use()
        yield
    plt.close("all")


def compared_table(seeds: int = 5) -> pd.DataFrame:
    verdicts = {"lori-d": "worse", "lori-s": "equivalent", "lora-longer": "cannot tell"}
    about = {"n": seeds, "of": "seeds × 1,000 rows or topics", "seeds": seeds, "margin": 0.02}
    about |= {"p_difference": 0.5, "p_holm": 0.01}
    return pd.DataFrame(
        {"arm": arm, "title": title, "method": arm[:6] if arm in verdicts and arm != "lora-longer" else "lora"}
        | {"task": task, "value": MEANS[arm], "low": MEANS[arm] - 0.015, "high": MEANS[arm] + 0.015}
        | {"verdict": verdicts[arm]}
        | about
        for task in TASKS
        for arm, title in ARMS.items()
    )


def seed_table(seeds: int = 5) -> pd.DataFrame:
    return pd.DataFrame(
        {"arm": arm, "task": task, "seed": seed, "value": MEANS[arm] + 0.01 * (seed - 2)}
        for task in TASKS
        for arm in ARMS
        for seed in range(seeds)
    )


def grid_table(chosen: float = 2e-3, seeds: int = 2) -> pd.DataFrame:
    rates = {"lora": 5e-4, "lori-d": 8e-3, "lori-s": 1.6e-2, "joint": 1e-3}
    return pd.DataFrame(
        {"arm": arm, "learning_rate": first * 2**i, "task": task, "seed": seed, "n": 128}
        | {"value": 0.5 - 0.05 * abs(i - 2) + 0.01 * seed, "chosen": first * 2**i == chosen}
        for arm, first in rates.items()
        for i in range(5)
        for task in TASKS[:2]
        for seed in range(seeds)
    )


def cost_table() -> pd.DataFrame:
    sizes = {
        "lora": (1.3e6, 0.0078),
        "lori-d": (6.6e5, 0.0077),
        "lori-s": (6.6e4, 0.0155),
        "lora-longer": (1.3e6, 0.0157),
    }
    return pd.DataFrame(
        {"arm": arm, "title": arm, "trainable_parameters": size, "training_pflops": cost, "metric": "mean of metrics"}
        | {"value": 0.6, "low": 0.55, "high": 0.65, "n": 5, "of": "seeds", "seeds": 5}
        for arm, (size, cost) in sizes.items()
    )


PAPER = {"lora": 5e-5, "lori-d": 5e-5, "lori-s": 5e-4}
PLOTS = {
    "forest": lambda ax: figures_lori.forest(ax, compared_table(), seed_table()),
    "forest of one seed": lambda ax: figures_lori.forest(ax, compared_table(1), seed_table(1)),
    "rates": lambda ax: figures_lori.rate_curves(ax, grid_table(), PAPER),
    "rate at the edge": lambda ax: figures_lori.rate_curves(ax, grid_table(8e-3)),
    "parameters": lambda ax: figures_lori.score_against_cost(ax, cost_table(), "trainable_parameters"),
    "operations": lambda ax: figures_lori.score_against_cost(ax, cost_table(), "training_pflops"),
}


def drawn(name: str):
    height = figures_lori.forest_height(compared_table()) if "forest" in name else 3.2
    figure, (ax,) = figures.panels(1, height=height)
    returned = PLOTS[name](ax)
    figures.shared_legend(figure)
    figure.canvas.draw()
    return figure, ax, returned


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_returns_its_axes_and_clips_nothing(name):
    figure, ax, returned = drawn(name)
    assert returned is ax
    whole, renderer = figure.bbox, figure.canvas.get_renderer()
    around = figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
    for box in (around, *(text.get_window_extent() for text in ax.texts)):
        assert box.x0 >= whole.x0 - 1 and box.y0 >= whole.y0 - 1, "a label reaches out of the figure"
        assert box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, "a label reaches out of the figure"


@pytest.mark.parametrize("name", PLOTS)
def test_text_is_readable_in_print_and_no_text_covers_another(name):
    figure, ax, _ = drawn(name)
    texts = [t for t in ax.texts if t.get_text()]
    assert min(t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text()) >= 8
    boxes = [t.get_window_extent() for t in texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i].get_text()
    for legend in figure.legends:
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())


def test_forest_has_a_dot_a_seed_an_interval_a_zero_line_a_band_and_the_words():
    _, ax, _ = drawn("forest")
    rows = len(ARMS) * len(TASKS)
    dots = [line for line in ax.lines if len(line.get_xdata()) == 5]
    assert len(dots) == rows
    assert dots[0].get_xdata() == pytest.approx(100 * seed_table()["value"][:5])  # in points
    bars = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] != line.get_xdata()[1]]
    assert len(bars) == rows and bars[0].get_xdata() == pytest.approx([-5.5, -2.5])
    assert [line for line in ax.lines if list(line.get_xdata()) == [0, 0]], "a line at zero"
    (band,) = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-2, 2))
    said = [text.get_text() for text in ax.texts]
    assert said.count("equivalent") == len(TASKS) == said.count("worse") and "-4.0 [-5.5, -2.5]" in said
    assert said.count("n = 5 seeds × 1,000 rows or topics") == len(TASKS)
    assert ax.get_xlabel() == "points against tuned LoRA"


def test_a_verdict_of_equivalence_is_marked_where_more_is_to_be_said():
    _, (ax,) = figures.panels(1)
    figures_lori.forest(ax, compared_table().assign(p_difference=0.01, p_holm=0.2), seed_table())
    said = [text.get_text() for text in ax.texts]
    assert said.count("equivalent*†") == len(TASKS) == said.count("worse")


def test_an_arm_far_from_all_others_stands_as_numbers_and_does_not_squeeze_them():
    table, far = compared_table(), "lori-d"
    away = table["arm"] == far
    table.loc[away, ["value", "low", "high"]] = [-0.5, -0.6, -0.4]
    (_, (usual,)), (_, (ax,)) = figures.panels(1), figures.panels(1)
    figures_lori.forest(usual, compared_table(), seed_table())
    figures_lori.forest(ax, table, seed_table())
    assert ax.get_xlim()[0] > -10 and "-50.0 [-60.0, -40.0]" in [text.get_text() for text in ax.texts]
    pointers = [line for line in ax.lines if line.get_marker() == "<" and len(line.get_xdata())]
    assert len(pointers) == len(TASKS) and not [each for each in usual.lines if each.get_marker() == "<"]


def test_one_seed_gets_no_verdict():
    _, ax, _ = drawn("forest of one seed")
    said = [text.get_text() for text in ax.texts]
    assert not {"equivalent", "worse", "cannot tell"} & set(said)
    assert any("one seed" in text for text in said)


def test_a_difference_without_an_interval_has_no_bar():
    table = compared_table().assign(low=math.nan, high=math.nan)
    _, (ax,) = figures.panels(1)
    figures_lori.forest(ax, table, seed_table())
    assert not [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] != line.get_xdata()[1]]


def test_rates_show_every_seed_the_choice_and_the_papers_rates():
    _, ax, _ = drawn("rates")
    lines = {line.get_label(): line for line in ax.lines}
    assert {"LoRA", "LoRI-D", "LoRI-S", "LoRA, joint", "chosen"} <= set(lines)
    expected = grid_table().query("arm == 'lora'").groupby("learning_rate")["value"].mean()
    assert lines["LoRA"].get_ydata() == pytest.approx(expected.to_numpy())
    seeds = [line for line in ax.lines if len(line.get_xdata()) == 10]
    assert len(seeds) == 4, "two seeds at five rates for each arm"
    marks = [tuple(line.get_xdata()) for line in ax.lines if line.get_transform() == ax.get_xaxis_transform()]
    assert {(5e-5,), (5e-4,)} <= set(marks)
    assert any("paper's rate" in label for label in lines)
    assert ax.get_xscale() == "log" and "256 rows held out of training, 2 seeds" in ax.get_title()


def test_a_choice_at_the_grid_s_edge_is_pointed_at():
    inside, outside = drawn("rates")[1], drawn("rate at the edge")[1]
    assert not [text for text in inside.texts if text.get_text() == "edge"]
    # 8e-3 is the last rate of LoRA's grid and the first of LoRI-D's
    assert len([text for text in outside.texts if text.get_text() == "edge"]) == 2


def test_arms_of_one_plot_look_different():
    looks = style.looks_of(["lora", "lora-longer", "lori-s-random", "lori-s"])
    assert looks["lora"] == style.look_of("lora") and looks["lori-s"] == style.look_of("lori-s")
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks)
    _, ax, _ = drawn("parameters")
    assert len(ax.get_legend_handles_labels()[1]) == 4 and ax.get_xscale() == "log"
    places = [float(np.ravel(bars.lines[0].get_xdata())[0]) for bars in ax.containers]
    assert places == cost_table()["trainable_parameters"].tolist()
