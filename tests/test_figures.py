"""Figures: every plot returns its axes, says what it shows, clips nothing, and is saved to the same bytes."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from lori_nb.study import figures, figures_joint, style

METHODS = ("lora", "lori-d", "lori-s")


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context():
        style.use()
        yield
    plt.close("all")


def summary_of(names: dict, value: float = 0.5, metric: str = "exact_match") -> dict:
    reach = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 192, "of": "rows", "seeds": 1}
    return names | reach | {"metric": metric}


def method_table(metric: str = "exact_match", values=(0.6, 0.5, 0.55)) -> pd.DataFrame:
    sizes = (2_600_000, 1_300_000, 130_000)
    rows = zip(METHODS, values, sizes, strict=True)
    return pd.DataFrame(
        summary_of({"method": m, "task": "chain_sum", "trainable_parameters": size}, v, metric) for m, v, size in rows
    )


def merge_table() -> pd.DataFrame:
    return pd.DataFrame(
        summary_of({"method": m, "merge": "cat", "weight": w}, w / 2) for m in METHODS for w in (0.3, 0.6, 1.0)
    )


def matrix(rows: int = 4) -> pd.DataFrame:
    names = ["family_relationships", "chain_sum", "word_sequence_reversal", "refusal"][:rows]
    values = np.linspace(0, 0.3, rows * rows).reshape(rows, rows)
    np.fill_diagonal(values, np.nan)
    return pd.DataFrame(values, index=names, columns=names)


def conflict_table(by: str, places) -> pd.DataFrame:
    return pd.DataFrame(
        summary_of({by: place, "pairs": pairs}, 0.45) for place in places for pairs in ("between", "within")
    )


def judged_table() -> pd.DataFrame:
    kinds = {"held": 0.2, "not held": -0.2, "cannot tell (the interval includes 0)": 0.0}
    return pd.DataFrame(
        summary_of({"measured as": f"LoRI-S − LoRA, case {kind[:4]}", "verdict": kind, "least": least}, value)
        for least, (kind, value) in zip((0.0, -0.05, 0.0), kinds.items(), strict=True)
    )


def spectrum_table() -> pd.DataFrame:
    rows = [
        {"method": m, "side": "A", "index": i, "low": 60 + i, "degrees": 62 + i, "high": 64 + i}
        for m in (*METHODS, "null")
        for i in range(1, 17)
    ]
    return pd.DataFrame(rows)


def loss_table() -> pd.DataFrame:
    return pd.DataFrame({"step": s, "loss": 3.0 / (1 + s), "sparsity": p} for p in (0.0, 0.9) for s in range(60))


def sparsity_table() -> pd.DataFrame:
    return pd.DataFrame(summary_of({"task": "chain_sum", "sparsity": s}, 0.5) for s in (0.0, 0.5, 0.9, 0.99))


def recovery_table() -> pd.DataFrame:
    table = pd.DataFrame({"arrangement": ["ortho-lora", "pcgrad", "pcgrad"], "value": [0.4, -0.2, 9.0]})
    table = table.assign(task=["chain_sum", "chain_sum", "refusal"], shown=[True, False, True])
    return table.assign(low=table["value"] - 0.3, high=table["value"] + 0.3)


def change_table() -> pd.DataFrame:
    ways = ("joint", "ortho-lora", "pcgrad")
    return pd.DataFrame({"arrangement": a, "step": s, "value": 0.1 * i} for i, a in enumerate(ways) for s in range(30))


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLOTS = {
    "parameters": lambda ax: figures.score_against_parameters(ax, method_table(), 0.2, 0.3, 4),
    "encoder": lambda ax: figures.score_against_parameters(ax, method_table("matthews", (-0.2, 0.1, 0.3)), 0.0),
    "sparsity": lambda ax: figures.score_against_sparsity(ax, sparsity_table()),
    "weight": lambda ax: figures.score_against_weight(ax, merge_table(), method_table()),
    "grouped": lambda ax: figures.grouped_points(ax, method_table(), "task", "method", "score"),
    "heat map": lambda ax: figures.heat_map(ax, matrix(), (0, 0.3)),
    "losses": lambda ax: figures.loss_curves(ax, loss_table()),
    "conflicts": lambda ax: figures_joint.conflict_points(ax, conflict_table("module", MODULES)),
    "conflict steps": lambda ax: figures_joint.conflict_steps(ax, conflict_table("step", range(5))),
    "recovery": lambda ax: figures_joint.recovery(ax, recovery_table()),
    "change": lambda ax: figures_joint.change_lines(ax, change_table()),
    "spectra": lambda ax: figures.spectra(ax, spectrum_table()),
    "verdicts": lambda ax: figures.verdicts(ax, judged_table()),
}


def drawn(name: str):
    figure, (ax,) = figures.panels(1, height=3.0)
    returned = PLOTS[name](ax)
    figures.shared_legend(figure)
    figure.canvas.draw()
    return figure, ax, returned


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_returns_its_axes_and_clips_nothing(name):
    figure, ax, returned = drawn(name)
    assert returned is ax
    whole, needed = figure.bbox, figure.get_tightbbox(figure.canvas.get_renderer())
    needed = needed.transformed(figure.dpi_scale_trans)
    assert needed.x0 >= whole.x0 - 1 and needed.y0 >= whole.y0 - 1, "a label reaches out of the figure"
    assert needed.x1 <= whole.x1 + 1 and needed.y1 <= whole.y1 + 1, "a label reaches out of the figure"


@pytest.mark.parametrize("name", PLOTS)
def test_text_is_readable_in_print_and_legends_stand_beside_the_data(name):
    figure, ax, _ = drawn(name)
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 8
    for legend in figure.legends:
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())


def test_axes_say_metric_and_n():
    figure, axes = figures.panels(2)
    figures.score_against_parameters(axes[0], method_table(), 0.2)
    figures.score_against_parameters(axes[1], method_table("matthews"), 0.0)
    assert axes[0].get_title() == "chain_sum (n = 192 rows, one seed)"
    assert axes[0].get_ylabel() == "exact match (share)" and axes[1].get_ylabel() == "Matthews correlation"
    assert axes[0].get_xlabel() == "trainable parameters (log)" and axes[0].get_xscale() == "log"


def test_correlations_may_be_negative_and_shares_not():
    _, axes = figures.panels(2)
    for ax, metric in zip(axes, ("matthews", "accuracy"), strict=True):
        figures.score_against_parameters(ax, method_table(metric, (-0.5, 0.1, 0.3)), 0.0)
    assert axes[0].get_ylim()[0] < -0.5 and -0.1 < axes[1].get_ylim()[0] < 0


def test_a_missing_interval_draws_no_bar_and_a_known_one_does():
    _, axes = figures.panels(2)
    lengths = []
    for ax, bound in zip(axes, (math.nan, 0.4), strict=True):
        table = method_table().assign(low=bound, high=1 - bound)
        figures.points(ax, [0, 1, 2], table, "lora")
        (_, _, (bars,)) = ax.containers[0]
        lengths.append(max(float(np.ptp(segment[:, 1])) for segment in bars.get_segments()))
    assert lengths[0] == 0 and lengths[1] > 0.1


def test_heat_map_keeps_missing_cells_empty_and_writes_the_others():
    _, (ax,) = figures.panels(1)
    figures.heat_map(ax, matrix(3), (0, 0.3), ".3f")
    assert len(ax.texts) == 6 and ax.texts[0].get_text() == f"{matrix(3).iloc[0, 1]:.3f}"


def test_numbers_of_a_large_heat_map_do_not_touch():
    names = [f"task_{n}" for n in range(16)]
    figure, (ax,) = figures.panels(1, height=5)
    figures.heat_map(ax, pd.DataFrame(np.full((16, 16), 0.123), index=names, columns=names), (0, 1), ".3f")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts[:16]]  # of the first row
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_the_similarity_map_has_i_upwards_and_j_to_the_right():
    table = pd.DataFrame([(i, j, i / 10 + j / 100) for i in (1, 2) for j in (1, 2, 3)], columns=["i", "j", "value"])
    _, (ax,) = figures.panels(1)
    image = figures.similarity(ax, table).images[0]
    np.testing.assert_allclose(image.get_array(), [[0.11, 0.12, 0.13], [0.21, 0.22, 0.23]])
    assert image.origin == "lower" and image.get_extent() == [0.5, 3.5, 0.5, 2.5] and image.get_clim() == (0, 1)


def test_heat_maps_of_signed_values_have_their_middle_at_zero():
    _, axes = figures.panels(1)
    figures.heat_maps(axes, {"signed": matrix(3) - 0.1}, "cosine")
    (image,) = axes[0].images
    assert image.norm.vmin == -image.norm.vmax < 0 and image.cmap.name == "PuOr"


def test_heat_maps_share_one_scale():
    figure, axes = figures.panels(2)
    figures.heat_maps(axes, {"small": matrix(3), "large": 2 * matrix(3)}, "overlap")
    scales = [ax.images[0].get_clim() for ax in axes]
    assert scales[0] == scales[1] == (0.0, 2 * np.nanmax(matrix(3)))
    assert len(figure.axes) == 3, "two maps and one colour bar"


def test_conflicts_that_were_not_measured_are_said_to_be():
    _, axes = figures.panels(2)
    empty = conflict_table("module", ())
    for ax, plot in zip(axes, (figures_joint.conflict_points, figures_joint.conflict_steps), strict=True):
        assert plot(ax, empty).texts[0].get_text() == "not measured"


def test_a_ratio_far_out_stands_as_a_number_at_the_edge():
    _, ax, _ = drawn("recovery")
    assert [text.get_text() for text in ax.texts] == ["9.0 →"] and ax.get_xlim()[1] <= 4


def test_where_there_is_no_gap_no_share_is_drawn():
    table = recovery_table().iloc[:2].assign(shown=[True, False])
    _, (ax,) = figures.panels(1)
    figures_joint.recovery(ax, table)
    points = [line for line in ax.lines if line.get_marker() not in ("None", None, "") and len(line.get_xdata())]
    assert [line.get_markerfacecolor() == "none" for line in points] == [False, True]
    _, (ax,) = figures.panels(1)
    figures_joint.recovery(ax, table.assign(value=[np.nan, table["value"].iloc[1]]))
    points = [line for line in ax.lines if line.get_marker() not in ("None", None, "") and len(line.get_xdata())]
    assert len(points) == 1 and not ax.texts


def cell_table(**changes) -> pd.DataFrame:
    cells = [(step, layer, factor) for step in (0, 6, 12) for layer in range(22, 30) for factor in "AB"]
    table = pd.DataFrame(cells, columns=["step", "layer", "factor"])
    return table.assign(between=np.linspace(-0.2, 0.1, len(table)), inside=table["layer"] > 25, n=5, **changes)


def test_the_conflict_map_hatches_what_noise_explains():
    figure, axes = figures.panels(2)
    table = cell_table()
    figures_joint.conflict_map(axes, table)
    figure.canvas.draw()
    meshes = [mesh for ax in axes for mesh in ax.collections]
    assert {mesh.get_clim() for mesh in meshes} == {(-0.2, 0.2)}  # one scale, white at zero
    assert [sum(bool(patch.get_hatch()) for patch in ax.patches) for ax in axes] == [4 * 3, 4 * 3]
    assert [ax.get_xlabel() for ax in axes] == ["step"] * 2
    figure, axes = figures.panels(2)
    figures_joint.conflict_map(axes, table.assign(n=1, inside=False))
    assert "one seed: not tested" in figure.legends[0].get_texts()[0].get_text()
    _, axes = figures.panels(2)
    figures_joint.conflict_map(axes, table.iloc[:0])
    assert axes[0].texts[0].get_text() == "not measured"


def test_methods_differ_in_colour_marker_and_line():
    looks = [style.look_of(name) for name in ("lora", "lori-d", "lori-s", "ortho-lora", "ortho-lori-d")]
    for part in ("color", "marker", "linestyle"):
        assert len({look[part] for look in looks}) == len(looks), part
    # Grey print: neighbours among the three default methods differ in luminance too.
    grey = sorted(np.dot(to_rgb(style.look_of(name)["color"]), (0.299, 0.587, 0.114)) for name in METHODS)
    assert min(np.diff(grey)) > 0.05


def test_an_unknown_method_gets_a_look_of_its_own_and_keeps_it():
    look = style.look_of("my-method")
    assert look == style.look_of("my-method") and look != style.look_of("lora")
    assert style.title_of("my-method") == "my-method" and style.title_of("lori-s") == "LoRI-S"


def test_panels_fill_rows():
    assert [len(figures.panels(count)[1]) for count in (1, 3, 4, 5)] == [1, 3, 4, 5]
    widths = {figures.panels(count)[0].get_figwidth() for count in (1, 3, 5)}
    assert widths == {style.WIDTH}


def test_saved_files_are_the_same_each_time_and_carry_their_provenance(tmp_path):
    about = {"title": "01_lori: scores", "provenance": "table quick/01_lori.parquet, commit abc"}
    names = {"one": "sparsity", "again": "sparsity", "another": "losses"}
    kept = {key: style.save(drawn(name)[0], tmp_path / key, "figure", about) for key, name in names.items()}
    assert [path.suffix for path in kept["one"]] == [".pdf", ".svg", ".png"]
    for one, again, another in zip(*kept.values(), strict=True):
        assert one.read_bytes() == again.read_bytes(), one.suffix
        assert one.read_bytes() != another.read_bytes(), one.suffix
    pdf, svg, png = kept["one"]
    assert "commit abc" in svg.read_text() and "<dc:date>" not in svg.read_text()
    assert Image.open(png).text["Description"] == about["provenance"] and Image.open(png).info["dpi"][0] >= 149
    assert b"commit abc" in pdf.read_bytes() and b"CreationDate" not in pdf.read_bytes()
