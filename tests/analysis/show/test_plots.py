"""Nine panels show measurements, and name missing ones."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes._base import _AxesBase
from matplotlib.axis import Tick
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image
from scipy.optimize import minimize

from lm_eval_bh import create_comprehensive_visualization, create_single_panel
from lm_eval_bh.analysis.show.plots import PANELS
from lm_eval_bh.analysis.show.plots.data import Experiments, NoDataError
from lm_eval_bh.analysis.show.plots.labels import spread
from lm_eval_bh.analysis.show.plots.style import ALPHA, PALETTE, STRETCH, fit_scale, focus, interval
from lm_eval_bh.analysis.show.plots.tradeoffs import pareto_front
from lm_eval_bh.analysis.table.matched_budget import matched_budget
from lm_eval_bh.errors import DataError, ParameterError

SIZES, ALPHAS = (8, 16, 32, 64), (0.3, 0.4, 0.5, 0.6)
TASKS = ("bh_wikitext", "bh_lambada", "bh_hellaswag")
# Of WikiText-2 at K = 8, 16, 32, 64, as published for OLMoE-1B-7B: the last flattens all else.
PERPLEXITY = {2: 31.0, 4: 19.4, 8: 16.76, 16: 17.59, 32: 22.04, 64: 52.48}


def experiment(task, k, alpha=None, variant="BH"):
    experts = float(k) if alpha is None else min(k, 20 * alpha**1.6 * (1 + k / 200))
    loss = PERPLEXITY[k] if alpha is None else 16.9 + 3 / experts + (0.4 if k == 8 else 0)
    top = alpha is None
    return {
        "run_id": f"{variant}-{k}-{alpha}",
        "group": 1,
        "model": "some/model",
        "task": task,
        "dataset": task.removeprefix("bh_"),
        "rule": "topk" if top else "bh",
        "variant": "top-k" if top else variant,
        "alpha": np.nan if top else alpha,
        "max_k": k,
        "strategy": f"top-{k}" if top else f"{variant} a={alpha}, max {k}",
        "configuration": f"{variant}-{k}-{alpha}",
        "baseline": top,
        "adaptive": not top,
        "mode": "patch",
        "native_top_k": 8,
        "avg_experts": experts,
        "avg_experts_model": experts,
        "perplexity": np.nan if task == "bh_hellaswag" else loss,
        "perplexity_stderr": np.nan if task == "bh_hellaswag" else 0.2,
        "accuracy": np.nan if task == "bh_wikitext" else 0.8 - loss / 100,
        "accuracy_stderr": np.nan if task == "bh_wikitext" else 0.03,
        "speed_ratio": 10 / (2 + experts),
        "speed_ratio_low": 9 / (2 + experts),
        "speed_ratio_high": 12 / (2 + experts),
        "expert_utilization": 0.9 if top else 0.97,
        "gini_coefficient": 0.3,
        "floor_hit_rate": 0.0 if top else 50.0,
        "mid_range_rate": 0.0 if top else 30.0,
        "ceiling_hit_rate": 100.0 if top else 20.0,
    }


def frame_of(configurations, tasks=TASKS):
    frame = pd.DataFrame([experiment(task, *some) for task in tasks for some in configurations])
    columns = dict.fromkeys(["word_perplexity", "target_perplexity", "byte_perplexity"], np.nan)
    frame = frame.assign(**columns)
    matched = matched_budget(frame)
    return frame.assign(**matched).astype({"matched_perplexity": float})


def layers_of(frame, count=16):
    adaptive = frame[frame["adaptive"]]
    return pd.DataFrame(
        [
            {"run_id": run, "task": task, "layer": layer, "tokens": 10, "mean": mean + layer / 8}
            for run, task, mean in zip(
                adaptive["run_id"], adaptive["task"], adaptive["avg_experts"], strict=True
            )
            for layer in range(count)
        ]
    )


BASELINES = [(k,) for k in SIZES]
FULL = BASELINES + list(itertools.product(SIZES, ALPHAS))
DATA = {
    "full preset": frame_of(FULL),
    "with static top-k between, and two variants": frame_of(
        [(2,), (4,), *FULL, *((8, alpha, "BH, contribution") for alpha in ALPHAS)]
    ),
    "quick run": frame_of([(8,), (8, 0.4), (8, 0.5)], TASKS[:1]),
    "one run": frame_of([(8, 0.4)], TASKS[2:]),
    "baselines only": frame_of(BASELINES),
}
EMPTY = {
    "quick run": {"accuracy"},
    "one run": {"perplexity", "pareto", "speed"},
    "baselines only": {"perplexity", "accuracy", "experts", "heatmap", "constraints", "layers"},
}


@pytest.fixture(scope="module", params=list(DATA))
def drawn(request):
    frame = DATA[request.param]
    figure = create_comprehensive_visualization(frame, layers=layers_of(frame))
    return request.param, figure


def texts_of(figure):
    """Return every text that is drawn with its box in pixels; ticks beyond the axes are not."""
    ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    texts = set(figure.findobj(Text)) - ticks
    for axes in figure.findobj(_AxesBase):
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            places = axis.get_majorticklocs()
            for place, tick in zip(places, axis.get_major_ticks(len(places)), strict=True):
                if min(limits) <= place <= max(limits):
                    texts |= {tick.label1, tick.label2}
    return {
        text: text.get_window_extent() for text in texts if text.get_visible() and text.get_text()
    }


def test_no_text_lies_on_other_text_or_is_cut_off(drawn):
    _, figure = drawn
    figure.draw_without_rendering()
    boxes = texts_of(figure)
    assert len(boxes) > 30
    for text, box in boxes.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, box), (other, of_other) in itertools.combinations(boxes.items(), 2):
        shared = min(box.x1, of_other.x1) - max(box.x0, of_other.x0)
        height = min(box.y1, of_other.y1) - max(box.y0, of_other.y0)
        assert min(shared, height) < 1.5, (one, other)  # boxes are a little larger than letters


def messages_of(part):
    """Return the boxed texts of a panel, which replace a drawing."""
    return [text.get_text().replace("\n", " ") for text in part.texts if text.get_bbox_patch()]


def test_a_panel_draws_or_says_which_run_would_fill_it(drawn):
    name, figure = drawn
    body = figure.subfigs[0]
    # Row by row; before 3.10 matplotlib keeps them column by column.
    parts = sorted(body.subfigs, key=lambda part: (-round(part.bbox.y0), part.bbox.x0))
    for panel, part in zip(PANELS, parts, strict=True):
        messages = messages_of(part)
        if panel in EMPTY.get(name, ()):
            assert not part.axes, panel
            assert "Run lm" in messages[0] or "lm-eval-bh report" in messages[0], panel
        else:
            assert part.axes, panel
            assert not messages, panel
            for axes in part.axes:
                assert axes.has_data(), panel
                assert axes.get_xlabel() or axes is not part.axes[-1], panel


def panel(name, data="full preset", **options):
    frame = DATA[data]
    return create_single_panel(frame, name, layers=layers_of(frame), **options)


def axes_of(figure):
    return figure.subfigs[0].subfigs[0].axes


def lines_of(axes):
    """Return colour -> values of the lines with markers."""
    return {
        to_hex(line.get_color()).upper(): line.get_ydata()
        for line in axes.lines
        if line.get_marker() not in ("None", "_", "|") and len(line.get_xdata()) == len(ALPHAS)
    }


def test_lines_show_the_numbers_of_the_table_in_the_colour_of_their_max_k():
    frame = DATA["full preset"]
    for name, column, task, factor in (
        ("perplexity", "perplexity", "bh_wikitext", 1),
        ("accuracy", "accuracy", "bh_lambada", 100),
        ("experts", "avg_experts", "bh_wikitext", 1),
    ):
        lines = lines_of(axes_of(panel(name))[0])
        rows = frame[(frame["task"] == task) & frame["adaptive"]]
        for colour, size in zip(PALETTE, SIZES, strict=False):
            expected = factor * rows[rows["max_k"] == size][column]
            assert lines[colour] == pytest.approx(expected.to_list()), (name, size)


def test_an_outlier_stands_at_the_edge_with_its_value():
    axes = axes_of(panel("perplexity"))[0]
    assert axes.get_ylim()[1] < 30
    labels = {text.get_text() for text in axes.texts}
    assert "top-8" in labels
    assert "top-64 52.5 \N{UPWARDS ARROW}" in labels


def test_every_baseline_is_on_the_pareto_panel():
    axes = axes_of(panel("pareto"))[0]
    assert {text.get_text().split()[0] for text in axes.texts} == {f"top-{k}" for k in SIZES}
    hollow = [
        line
        for line in axes.lines
        if to_hex(line.get_markerfacecolor()) == "#ffffff" and line.get_marker() != "d"
    ]
    assert sorted(line.get_xdata()[0] for line in hollow) == list(SIZES)


def test_small_multiples_share_an_axis_that_holds_all_their_points():
    frame = DATA["full preset"].copy()
    slow = (frame["task"] == "bh_lambada") & frame["baseline"]
    frame.loc[slow, ["speed_ratio", "speed_ratio_low", "speed_ratio_high"]] /= 100
    for axes in axes_of(create_single_panel(frame, "speed")):
        low, high = axes.get_xlim()
        shown = np.concatenate([line.get_xdata() for line in axes.lines])
        assert low < shown.min()
        assert shown.max() < high


def test_error_bars_are_inside_their_axes_and_no_accuracy_is_negative():
    frame = DATA["full preset"].assign(perplexity_stderr=8.0)
    low, high = axes_of(create_single_panel(frame, "pareto"))[0].get_ylim()
    rows = frame[(frame["task"] == "bh_wikitext") & frame["adaptive"]]
    assert low < (rows["perplexity"] - 8).min()
    assert (rows["perplexity"] + 8).max() < high
    never = create_single_panel(frame.assign(accuracy=0.0, accuracy_stderr=0.0), "accuracy")
    assert axes_of(never)[0].get_ylim()[0] > -0.1


def test_static_top_k_stands_beside_every_adaptive_point():
    data = "with static top-k between, and two variants"
    axes = axes_of(panel("pareto", data))[0]
    diamonds = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])): to_hex(line.get_markerfacecolor())
        for line in axes.lines
        if line.get_marker() == "d"
    }
    rows = DATA[data]
    rows = rows[(rows["task"] == "bh_wikitext") & rows["adaptive"]]
    assert len(rows) == 20
    for _, row in rows.iterrows():
        face = diamonds[row["avg_experts_model"], row["matched_perplexity"]]
        assert (face == "#ffffff") == (row["matched_by"] == "interpolated")
    missing = axes_of(panel("pareto", "quick run"))[-1].get_xlabel()
    assert "run k=" in missing
    assert "run k=" not in axes.get_xlabel()


def test_cells_and_bars_hold_the_means_over_tasks():
    texts = [text.get_text() for text in axes_of(panel("heatmap"))[0].texts]
    rows = DATA["full preset"]
    means = rows[rows["adaptive"]].groupby(["max_k", "alpha"])["avg_experts"].mean()
    assert texts == [f"{mean:.2f}" if mean < 10 else f"{mean:.1f}" for mean in means]
    bars = axes_of(panel("constraints"))[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx(
        [50.0] * 16 + [30.0] * 16 + [20.0] * 16
    )
    use = axes_of(panel("utilization"))[0].patches
    assert [bar.get_width() for bar in use] == pytest.approx([90.0, *[97.0] * 4] * 4)


def test_configurations_that_lack_a_task_are_in_no_mean_over_tasks():
    frame = DATA["full preset"]
    partial = frame.drop(frame.index[(frame["task"] == "bh_lambada") & (frame["alpha"] == 0.3)])
    data = Experiments(partial, None)
    assert set(data.over_tasks(data.adaptive, ["avg_experts"])["alpha"]) == {0.4, 0.5, 0.6}


def test_repeats_are_averaged_and_analyze_runs_are_left_out():
    frame = DATA["quick run"]
    again = frame[frame["alpha"] == 0.4].assign(perplexity=40.0, run_id="again")
    looked = frame[frame["alpha"] == 0.5].assign(mode="analyze", configuration="other")
    rows = Experiments(pd.concat([frame, again, looked]), None).rows
    assert len(rows) == len(frame)
    mean = (frame[frame["alpha"] == 0.4]["perplexity"].iloc[0] + 40) / 2
    assert rows[rows["alpha"] == 0.4]["perplexity"].tolist() == pytest.approx([mean])


def test_layers_show_the_middle_level():
    axes = axes_of(panel("layers"))[0]
    marked = [line for line in axes.lines if line.get_marker() not in ("None", "")]
    assert len(marked) == len(SIZES)
    mean = DATA["full preset"].query("alpha == 0.4 and max_k == 8")["avg_experts"].mean()
    assert marked[0].get_ydata() == pytest.approx(mean + np.arange(16) / 8)
    figure = create_single_panel(DATA["full preset"], "layers")
    assert "lm-eval-bh report FOLDER --figure" in messages_of(figure.subfigs[0].subfigs[0])[0]


@pytest.mark.parametrize("experts", [16, 512])
def test_any_number_of_sizes_can_be_told_apart(experts):
    frame = DATA["full preset"]
    many = pd.concat(
        [
            frame[frame["max_k"] == 8].assign(
                max_k=k, configuration=frame["configuration"] + str(k)
            )
            for k in (2 ** np.arange(np.log2(experts))).astype(int)
        ]
    )
    lines = lines_of(axes_of(create_single_panel(many, "experts"))[0])
    assert len(lines) == len(set(lines)) == many["max_k"].nunique()


# Files


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?x")]
)
def test_files_are_of_the_format_of_their_suffix_and_always_the_same(tmp_path, suffix, start):
    paths = [tmp_path / "new" / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        panel("heatmap", output_path=path)
    contents = [path.read_bytes() for path in paths]
    assert contents[0].startswith(start)
    assert contents[0] == contents[1]
    assert len(list(paths[0].parent.iterdir())) == 2
    if suffix == "png":
        with Image.open(paths[0]) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_a_table_read_again_gives_the_same_figure(tmp_path):
    frame = DATA["full preset"]
    frame.to_csv(tmp_path / "table.csv", index=False)
    for name, table in (("one", frame), ("two", pd.read_csv(tmp_path / "table.csv"))):
        create_single_panel(table, "pareto", tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_notebook_shows_the_figure():
    figure = panel("heatmap")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    frame = DATA["quick run"]
    with pytest.raises(ParameterError, match="did you mean 'pareto'"):
        create_single_panel(frame, "paretto")
    with pytest.raises(ParameterError, match="ends in png, pdf, svg"):
        create_single_panel(frame, "pareto", tmp_path / "figure.jpg")
    with pytest.raises(DataError, match="no column strategy"):
        create_single_panel(frame.drop(columns="strategy"), "pareto")
    with pytest.raises(DataError, match="2 groups"):
        create_single_panel(pd.concat([frame, frame.assign(group=2)]), "pareto")
    assert not list(tmp_path.iterdir())


def test_plots_need_neither_torch_nor_pyplot():
    code = (
        "import sys, lm_eval_bh.analysis.show.plots.figure\n"
        "print({'torch', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Geometry

places = st.lists(st.floats(0, 100), min_size=1, max_size=6).map(sorted)


@given(places, st.floats(0.1, 20))
def test_labels_keep_their_order_and_distance(wanted, gap):
    found = spread(wanted, gap)
    assert (np.diff(found) >= gap - 1e-9).all()
    if (np.diff(wanted) >= gap).all():
        assert found == pytest.approx(wanted)


def test_labels_are_as_near_as_can_be():
    wanted, gap = [0.0, 1.0, 1.5, 9.0], 2.0
    best = minimize(
        lambda at: np.square(at - wanted).sum(),
        np.arange(4) * 3.0,
        constraints={"type": "ineq", "fun": lambda at: np.diff(at) - gap},
    )
    assert spread(wanted, gap) == pytest.approx(best.x, abs=1e-4)


@given(st.floats(1e-3, 1e4), st.floats(1.2, 1e5))
def test_ticks_are_few_and_within(low, ratio):
    axes = Figure().subplots()
    fit_scale(axes, "y", [low, low * ratio])
    start, end = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if start <= tick <= end]
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


values = st.lists(st.floats(1, 1e6), min_size=1, max_size=8)


@given(values, values)
def test_an_axis_shows_what_matters_and_never_much_more(core, others):
    shown = np.log(focus(core, others))
    length = max(np.ptp(np.log(core)), 0.02)
    assert set(focus(core, others)) >= set(core)
    assert np.ptp(shown) <= STRETCH * length + 1e-9
    inside = [other for other in others if min(core) <= other <= max(core)]
    assert set(inside) <= set(focus(core, others))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points):
    cost, loss = np.array(points, dtype=float).T
    front = pareto_front(cost, loss)
    unbeaten = {
        one
        for one in points
        if not any(
            all(a <= b for a, b in zip(other, one, strict=True)) and other != one
            for other in points
        )
    }
    assert {points[i] for i in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert (np.diff(cost[front]) > 0).all()


def test_a_table_without_rows_says_so():
    data = Experiments(DATA["quick run"].iloc[:0], None)
    with pytest.raises(NoDataError):
        PANELS["pareto"].draw(None, data, None, None)
    assert create_comprehensive_visualization(DATA["quick run"].iloc[:0]) is not None


@given(value=st.floats(1.0, 1e6), share=st.floats(0.0, 2.9))
def test_the_error_bar_of_a_perplexity_is_symmetric_in_its_logarithm(value, share):
    low, high = interval(value, share * value)
    assert 0 < low <= value <= high
    assert np.log(high / value) == pytest.approx(np.log(value / low), abs=1e-9)
    small_low, small_high = interval(value, 1e-4 * value)  # as the plain one where it is narrow
    assert (small_low, small_high) == pytest.approx(interval(value, 1e-4 * value, log=False))


def test_an_error_that_bounds_nothing_is_left_out():
    """lm-eval's bootstrap of a perplexity over six documents gave 2,000 times the value."""
    low, high = interval([5.0, 5.0], [1.0, 10_000.0])
    assert low[1] == high[1] == 5.0
    assert low[0] < 5.0 < high[0]


def test_what_was_solved_for_a_target_is_no_place_on_the_axis_of_levels():
    frame = frame_of([(8,), (8, 0.4), (8, 0.6), (8, 0.47, "BH, target"), (8, 0.53, "BH, target")])
    frame["target_experts"] = frame["alpha"].map({0.47: 4.0, 0.53: 5.0})
    data = Experiments(frame, layers_of(frame))
    means = data.over_tasks(data.adaptive, ["avg_experts"])
    assert means["alpha"].dropna().tolist() == [0.4, 0.6]
    assert means["target_experts"].dropna().tolist() == [4.0, 5.0]
    assert len(data.layers.groupby(["variant", "alpha", "target_experts"], dropna=False)) == 4
    drawn = {
        name: {text.get_text() for text in create_single_panel(frame, name).findobj(Text)}
        for name in ("heatmap", "experts", "constraints")
    }
    for name in ("heatmap", "experts"):
        assert {"0.4", "0.6"} <= drawn[name]
        assert not {"0.47", "0.53"} & drawn[name]
    assert {"0.4", "0.6", "target 4", "target 5"} <= drawn["constraints"]


def words_of(frame, panel):
    drawn = create_single_panel(frame, panel, layers=layers_of(frame))
    return {text.get_text() for text in drawn.findobj(Text)}


THRESHOLDS = [(8, 0.01, "min-w"), (8, 0.02, "min-w")]


@pytest.mark.parametrize(
    ("configurations", "axis", "other"),
    [
        ([(8,), (8, 0.4), (8, 0.5), (8, 0.6), *THRESHOLDS], "level", {"0.01", "0.02"}),
        ([(8,), (8, 0.4), *THRESHOLDS], "threshold", {"0.4"}),
        ([(8,), *THRESHOLDS], "threshold", set()),
    ],
    ids=["mostly levels", "mostly thresholds", "thresholds alone"],
)
def test_levels_and_thresholds_do_not_stand_on_one_axis(configurations, axis, other):
    frame = frame_of(configurations)
    frame["alpha_is"] = frame["variant"].map({"BH": "level", "min-w": "threshold"})
    for name in ("perplexity", "accuracy", "experts", "heatmap"):
        drawn = words_of(frame, name)
        assert f"{axis} {ALPHA}" in drawn
        assert not other & drawn
    everywhere = {f"{row[1]:g}" for row in configurations if len(row) > 1}
    assert everywhere <= words_of(frame, "constraints")
    create_comprehensive_visualization(frame, layers=layers_of(frame)).canvas.draw()


def test_points_of_short_lines_are_named_and_of_long_ones_are_not():
    frame = frame_of(
        [(4,), (8,), *[(8, level) for level in ALPHAS], (8, 0.47, "min-w, target, benefit")]
    )
    frame["target_experts"] = frame["alpha"].map({0.47: 4.0})
    for name in ("pareto", "speed"):
        drawn = words_of(frame, name)
        assert "min-w target 4" in drawn
        assert not {f"BH {level:g}" for level in ALPHAS} & drawn


def test_rows_show_the_line_of_their_rule_where_rules_are_several():
    frame = frame_of([(8,), (8, 0.4), (8, 0.4, "BY")])

    def samples(of):
        notes = create_single_panel(of, "constraints").findobj(Annotation)
        return {str(note.arrow_patch.get_linestyle()) for note in notes if note.arrow_patch}

    assert len(samples(frame)) == 2
    assert not samples(frame[frame["variant"] != "BY"])


def test_accuracies_that_compare_nothing_are_said_and_not_drawn():
    frame = frame_of([(8,), (8, 0.4), (8, 0.5)])
    frame["accuracy_note"] = frame["task"].map(
        {"bh_lambada": "all wrong", "bh_hellaswag": "at chance"}
    )
    drawn = words_of(frame, "accuracy")
    assert {
        "hellaswag, all at chance",
        f"level {ALPHA}\n(lambada: all wrong in every run)",
    } <= drawn
    assert "lambada" not in drawn
    lambada = words_of(frame[frame["task"] == "bh_lambada"], "accuracy")
    assert any("No run answered" in " ".join(text.split()) for text in lambada)


def test_a_table_of_targets_alone_is_drawn():
    frame = frame_of([(8,), (8, 0.47, "BH, target")])
    frame["target_experts"] = frame["alpha"].map({0.47: 4.0})
    create_comprehensive_visualization(frame, layers=layers_of(frame)).canvas.draw()


def test_a_value_without_an_error_is_its_own_interval():
    low, high = interval([3.0, 4.0], [np.nan, 1.0], log=False)
    assert (list(low), list(high)) == ([3.0, 3.0], [3.0, 5.0])
