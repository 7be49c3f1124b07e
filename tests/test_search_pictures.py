"""What the pictures of a search promise: which ones there are when, what stands in them, and that nothing is left behind."""

import datetime as dt
import math
import struct

import matplotlib
import numpy as np
import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from stn_pipeline.search import pictures as module
from stn_pipeline.search.pictures import importances, pictures, whole

pytestmark = pytest.mark.filterwarnings("error")  # none of ours, of Optuna's or of matplotlib's

SPACE = {
    "lr": FloatDistribution(1e-4, 3e-2, log=True),
    "loc_lr_multiplier": FloatDistribution(1e-3, 1.0, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
    "batch_size": CategoricalDistribution((32, 64, 128, 256, 512)),
    "coordconv": CategoricalDistribution((False, True)),
    "transform": CategoricalDistribution(("none", "affine", "diffeo", "similarity", "projective", "tps")),
    "epochs": IntDistribution(5, 50),
}
FILES = {"history", "importances", "parallel_coordinates", "slices", "intermediate_values", "timeline"}
COMPLETE, PRUNED, FAIL, RUNNING, WAITING = (TrialState[name] for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"))
LR, TWO = {"lr": 1e-3}, {"lr": 1e-3, "loc_lr_multiplier": 0.1}


def study_of(*rows, direction="minimize"):
    """Return a study, a trial per (state, params, values by epoch, user attributes): each takes 20 s, 10 s after the one before."""
    study = optuna.create_study(study_name="s", direction=direction)
    for number, (state, params, values, *attributes) in enumerate(rows):
        start = dt.datetime(2026, 11, 23, 14, 2) + dt.timedelta(seconds=10 * number)
        trial = FrozenTrial(
            number=number,
            trial_id=number,
            state=state,
            value=values[-1] if values and state in (COMPLETE, PRUNED) else None,
            datetime_start=None if state == WAITING else start,
            datetime_complete=start + dt.timedelta(seconds=20) if state.is_finished() else None,
            params=params,
            distributions={name: SPACE[name] for name in params},
            user_attrs=dict(*attributes),
            system_attrs={},
            intermediate_values=dict(enumerate(values, 1)),
        )
        study.add_trial(trial)
    return study


def random_study(n, names, direction="minimize"):
    """Return a study of n trials, half of them pruned, a few failed, lost or collapsed; the default has no weight_decay."""
    rng = np.random.default_rng(0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rows = []
    for number in range(n):
        params = study.ask({name: SPACE[name] for name in names if number or name != "weight_decay"}).params
        last = 2.3 if number % 17 == 5 else 0.07 * math.exp(0.3 * rng.random())
        values = [*np.geomspace(0.5, last, 12)] if last < 2 else [last] * 12
        state, stop, attributes = COMPLETE, 12, {}
        if number % 2 and last < 2:
            state, stop = PRUNED, rng.choice([1, 3, 9])
        if number % 13 == 12:
            state, stop, attributes = FAIL, number % 3, {"lost": "worker"} if number % 2 else {}
        values = [1 - value / 3 if direction == "maximize" else value for value in values]
        rows.append((state, params, [float(value) for value in values[:stop]], attributes))
    return study_of(*rows, direction=direction)


@pytest.fixture
def draw(monkeypatch):
    """Return a function that draws a study and returns its figures by name, as they were when they should become PNG."""
    figures = []
    monkeypatch.setattr(module, "to_png", lambda figure: figures.append(figure) or b"PNG")

    def drawn(study, objective="val/loss"):
        figures.clear()
        return dict(zip([name.removesuffix(".png") for name in pictures(study, objective, "mnist-3")], figures, strict=True))

    return drawn


def points(axes, label):
    """Return the (n, 2) points of the lines that have a label."""
    return np.concatenate([np.empty((0, 2)), *(line.get_xydata() for line in axes.lines if line.get_label() == label)])


def height(axes, value):
    """Return how high on the axis a tick's value stands, 0..1."""
    at = dict(zip([float(text.get_text()) for text in axes.get_yticklabels()], axes.get_yticks(), strict=True))[value]
    return (at - axes.get_ylim()[0]) / np.ptp(axes.get_ylim())


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


# --- which pictures there are


@pytest.mark.parametrize(
    ("rows", "files"),
    [
        ([], set()),
        ([(WAITING, LR, [])], set()),
        ([(RUNNING, LR, [])], {"timeline"}),
        ([(RUNNING, LR, [0.5, 0.4])], {"timeline", "intermediate_values"}),
        ([(FAIL, LR, [], {"lost": "worker"}), (FAIL, LR, [])], {"timeline"}),
        ([(FAIL, LR, [2.3]), (PRUNED, LR, [0.5]), (PRUNED, LR, [])], {"timeline", "intermediate_values"}),
        ([(COMPLETE, LR, [math.inf]), (PRUNED, LR, [0.3, math.nan])], {"timeline", "intermediate_values"}),
        ([(COMPLETE, {}, [0.5])], {"timeline", "intermediate_values", "history"}),
        ([(COMPLETE, LR, [0.5])], FILES - {"importances"}),
        ([(COMPLETE, LR, [0.5 + i / 100]) for i in range(20)], FILES - {"importances"}),
        ([(COMPLETE, TWO, [0.5 + i / 100]) for i in range(7)], FILES - {"importances"}),
        ([(COMPLETE, TWO, [2.3])] * 20, FILES - {"importances"}),
        ([(COMPLETE, TWO, [0.5 + i / 100]) for i in range(8)], FILES),
    ],
)
def test_what_cannot_be_drawn_yet_is_left_out(draw, rows, files):
    figures = draw(study_of(*rows))
    assert figures.keys() == files
    for figure in figures.values():
        figure.draw_without_rendering()  # what a layout would choke on, it chokes on here


def test_a_single_trial_has_whole_numbers_on_its_axis(draw):
    figures = draw(study_of((COMPLETE, LR, [0.5])))
    for axis in (figures["history"].axes[0].xaxis, figures["timeline"].axes[0].yaxis, figures["intermediate_values"].axes[0].xaxis):
        assert all(float(at).is_integer() for at in axis.get_ticklocs())


def test_pictures_are_png_of_a_readable_size_and_leave_nothing_behind():
    before = dict(matplotlib.rcParams)
    drawn = pictures(random_study(20, ("lr", "batch_size")), "val/loss", "t")
    assert drawn.keys() == {f"{name}.png" for name in FILES}
    for png in drawn.values():
        assert png.startswith(b"\x89PNG\r\n")
        wide, high = struct.unpack(">II", png[16:24])
        assert 600 < wide < 2000
        assert 200 < high < 1000
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("n", "names", "direction"),
    [
        (30, ("lr", "loc_lr_multiplier"), "minimize"),
        (40, ("lr", "weight_decay", "batch_size", "coordconv", "transform", "epochs"), "maximize"),
        (3, ("lr", "transform"), "minimize"),
        (80, ("lr",), "maximize"),
    ],
)
def test_no_word_is_cut_and_no_tick_runs_into_the_next(draw, n, names, direction):
    for name, figure in draw(random_study(n, names, direction), "val/loss" if direction == "minimize" else "val/accuracy").items():
        assert figure.get_suptitle() == "mnist-3"
        figure.draw_without_rendering()
        inside = figure.get_tightbbox()  # inches, of all that is drawn
        assert min(inside.x0, inside.y0) > -0.02, name
        assert inside.x1 < figure.get_figwidth() + 0.02 and inside.y1 < figure.get_figheight() + 0.02, name
        for axes in figure.axes:
            low, high = axes.get_xlim()
            ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [label.get_window_extent() for label in ticks if not label.get_rotation()]
            assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False)), name


# --- what stands in them


def test_trials_without_every_parameter_are_not_compared(draw):
    study = study_of((COMPLETE, LR, [0.1]), *((COMPLETE, TWO, [0.2 + i / 100]) for i in range(9)))
    assert [trial.number for trial in whole(study.trials)] == list(range(1, 10))
    assert importances(study).keys() == TWO.keys()
    figures = draw(study)
    assert figures.keys() == FILES
    assert len(points(figures["history"].axes[0], "finished")) == 10
    assert [len(points(axes, "finished")) for axes in figures["slices"].axes] == [9, 9]
    assert len(points(figures["slices"].axes[0], "default")) == 0
    assert not {"best", "default"} & legend(figures["parallel_coordinates"])  # the default is both, and not there


def test_a_knob_that_only_pruned_trials_give_away_is_important():
    rng = np.random.default_rng(0)
    good = [(COMPLETE, {"lr": 2e-3 * 1.02**i, "loc_lr_multiplier": rng.uniform(1e-3, 1)}, [0.08 + 0.01 * rng.random()]) for i in range(10)]
    bad = [(PRUNED, {"lr": 1e-4 * 1.1**i, "loc_lr_multiplier": rng.uniform(1e-3, 1)}, [0.5]) for i in range(20)]
    shares = importances(study_of(*good, *bad))
    assert shares["lr"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_a_range_that_changed_on_the_way_is_no_matter():
    study = study_of(*((COMPLETE, TWO, [0.5 + i / 100]) for i in range(20)))
    narrow = {name: FloatDistribution(1e-3, 0.2, log=True) for name in TWO}
    study.add_trial(optuna.create_trial(value=0.4, params=TWO, distributions=narrow))
    assert importances(study).keys() == TWO.keys()


@pytest.mark.parametrize("picture", ["history", "slices", "parallel_coordinates"])
def test_a_collapsed_run_does_not_flatten_the_others(draw, picture):
    values = (0.07, 0.08, 0.09, 0.1, 0.085, 2.3, 0.075, 0.088)
    axes = draw(study_of(*((COMPLETE, LR, [value]) for value in values)))[picture].axes[0]
    if picture != "parallel_coordinates":
        assert height(axes, 0.09) - height(axes, 0.08) > 0.2
        assert sorted(points(axes, "finished")[:, 1])[-1] == axes.get_ylim()[1]  # the collapsed one, on the edge
    else:
        ends = sorted(line.get_ydata()[-1] for line in axes.lines if line.get_label() == "finished")
        assert np.diff(ends)[:-1].sum() > 0.8
        assert ends[-1] == 1


def test_a_default_that_is_merely_bad_is_in_view(draw):
    axes = draw(study_of(*((COMPLETE, LR, [value]) for value in (0.12, 0.08, 0.081))))["history"].axes[0]
    assert points(axes, "default")[0, 1] < axes.get_ylim()[1]


@pytest.mark.parametrize(("direction", "best"), [("minimize", 2), ("maximize", 0)])
def test_history_shows_each_trial_by_its_kind_and_the_best_so_far(draw, direction, best):
    rows = [(COMPLETE, LR, [v]) for v in (0.9, 0.8, 0.7, 0.75)] + [(PRUNED, LR, [0.5 if best else 0.95]), (FAIL, LR, [0.6])]
    study = study_of(*rows, (FAIL, LR, [], {"lost": "worker"}), (RUNNING, LR, [0.6]), direction=direction)
    figure = draw(study, "val/loss" if direction == "minimize" else "val/accuracy")["history"]
    axes = figure.axes[0]
    assert legend(figure) == {"finished", "pruned", "failed", "lost", "best", "default", "best so far"}
    for kind, numbers in {"finished": [0, 1, 2, 3], "pruned": [4], "failed": [5], "lost": [6], "best": [best], "default": [0]}.items():
        assert points(axes, kind)[:, 0].tolist() == numbers
    steps = points(axes, "best so far")
    assert np.all(np.diff(steps[:, 1]) * (-1 if direction == "minimize" else 1) >= 0)
    assert steps[-1].tolist() == [7, points(axes, "best")[0, 1]]
    assert axes.get_ylabel() == ("val/loss (nats per image)" if direction == "minimize" else "val/accuracy")
    assert points(axes, "failed")[0, 1] == axes.get_ylim()[direction == "minimize"]  # the bad edge


def test_slices_have_the_searched_range_and_every_choice(draw):
    other = {"coordconv": True, "weight_decay": 1e-3}
    rows = [(COMPLETE, {"lr": 10.0**-e, "batch_size": size} | other, [0.1 * e]) for e, size in ((2, 64), (3, 64), (4, 512))]
    lr, batch_size, coordconv, weight_decay = draw(study_of(*rows))["slices"].axes
    assert [text.get_text() for text in lr.get_xticklabels()] == ["0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03"]
    assert points(lr, "finished")[:, 0] == pytest.approx([-2, -3, -4])
    assert [text.get_text() for text in batch_size.get_xticklabels()] == ["32", "64", "128", "256", "512"]
    assert points(batch_size, "finished")[:, 0].round().tolist() == [1, 1, 4]
    assert batch_size.get_xlabel() == "batch_size (images)"
    assert [text.get_text() for text in coordconv.get_xticklabels()] == ["false", "true"]
    assert [text.get_text() for text in weight_decay.get_xticklabels()] == ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]
    assert np.ptp(points(batch_size, "finished")[:2, 0]) > 0.05  # equal choices are spread


def test_intermediate_values_end_where_each_trial_did(draw):
    study = study_of((COMPLETE, LR, [0.5, 0.3, 0.1]), (PRUNED, LR, [0.6]), (RUNNING, LR, [0.5, 0.2]), (FAIL, LR, []))
    axes = draw(study)["intermediate_values"].axes[0]
    assert points(axes, "best")[:, 0].tolist() == points(axes, "default")[:, 0].tolist() == [1, 2, 3]
    assert points(axes, "pruned")[:, 0].tolist() == [1]
    assert points(axes, "running")[-1] == pytest.approx([2, math.log10(0.2)])
    assert axes.get_ylabel().startswith("val/loss (nats per image)")


def test_the_timeline_has_a_bar_a_trial_and_knows_retries(draw):
    rows = [(FAIL, LR, [], {"lost": "worker"}), (COMPLETE, LR, [0.5]), (COMPLETE, LR, [0.6], {"retry_of": 0}), (RUNNING, LR, [])]
    axes = draw(study_of(*rows))["timeline"].axes[0]
    bars = {round(bar.get_y() + 0.4): (bar.get_x(), bar.get_width()) for bar in axes.patches}
    assert {number: bars[number] for number in range(3)} == {0: (0, 20), 1: (10, 20), 2: (20, 20)}
    assert bars[3] == (30, 10)  # until the last that is known
    assert axes.get_xlabel() == "s since 2026-11-23 14:02"
    assert {text.xy[1]: text.get_text() for text in axes.texts if text.get_text()} == {1: "best", 2: "default, retry of 0"}
    assert axes.yaxis_inverted()
    assert axes.get_xlim()[1] > 40
