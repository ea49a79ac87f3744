from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from jaxarch.run import metrics
from jaxarch.run.metrics import Log, draw, interquartile_mean, interval, lines, read
from jaxarch.run.program import Member


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 11])
def test_interquartile_mean_is_the_trimmed_mean(n):
    values = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(interquartile_mean(values), scipy.stats.trim_mean(values, 0.25, axis=-1))


def test_the_interval_covers_the_true_mean_nineteen_times_in_twenty():
    """Coverage over 200 repetitions of 30 normal values: within what a percentile bootstrap reaches."""
    rng = np.random.default_rng(0)
    inside = [low <= 3.0 <= high for low, high in (interval(rng.normal(3, 1, 30), 500) for _ in range(200))]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_lines_leave_out_the_dead_and_group_by_point():
    members = [Member(seed, {"rate": rate}) for rate in (1.0, 2.0) for seed in (0, 1)]
    values = {"loss": np.array([1.0, np.nan, 4.0, 6.0]), "rare": np.array([np.nan, np.nan, 2.0, np.nan])}
    one, two = lines(values, members, dead=[1])
    assert one["sweep"] == {"rate": 1.0} and one["loss"] == 1.0 and one["alive"] == 1
    assert one["loss/replicas"] == [1.0, None] and "rare" not in one
    assert two["loss"] == 5.0 and two["loss/low"] >= 4.0 and two["loss/high"] <= 6.0 and two["rare"] == 2.0


def test_a_single_run_has_one_plain_line():
    assert lines({"loss": np.array([2.5])}, [Member(0, {})]) == [{"loss": 2.5}]


def test_the_log_is_cut_to_a_checkpoint_and_survives_a_torn_line(tmp_path):
    log = Log(tmp_path)
    for step in (1, 2, 3):
        log.write(step, 0.5, [{"train/loss": 1.0 / step}])
    with log.path.open("a") as file:
        file.write('{"step": 4, "train/l')
    assert [line["step"] for line in read(log.path)] == [1, 2, 3]
    log.keep_until(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_speed_stands_beside_the_metrics_for_followers_too_but_has_no_curve(tmp_path, monkeypatch):
    followed = []
    monkeypatch.setattr(metrics, "_follower", lambda name, folder: lambda step, line: followed.append((step, line)))
    pictures = []
    for number, speed in enumerate(({}, {"steps_per_second": 2.0, "mfu": 0.5})):
        (tmp_path / f"{number}").mkdir()
        log = Log(tmp_path / f"{number}")
        log.write(7, 3.5, [{"train/loss": 1.0}], speed)
        assert read(log.path) == [{"step": 7, "seconds": 3.5, **speed, "train/loss": 1.0}]
        draw(log.path, tmp_path / "curves.png")
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert followed == [(7, {"train/loss": 1.0}), (7, {"steps_per_second": 2.0, "mfu": 0.5, "train/loss": 1.0})]
    assert pictures[0] == pictures[1]


def test_curves_are_drawn_for_replicas_and_sweeps(tmp_path):
    log = Log(tmp_path)
    members = [Member(seed, {"rate": rate}) for rate in (1.0, 2.0) for seed in (0, 1)]
    for step in (0, 10):
        values = {"train/loss": np.arange(4.0) + step, "val/loss": np.arange(4.0)}
        log.write(step, 0.1, lines(values, members))
    draw(log.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize("seeds", [1, 2])
def test_parts_of_a_quantity_share_its_panel(seeds, tmp_path, monkeypatch):
    """With several replicas too, whose statistics stand as deep in the names."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    log = Log(tmp_path)
    members = [Member(seed, {}) for seed in range(seeds)]
    names = ["train/loss", "val/loss", "train/norm", *(f"train/norm/layer_{i}" for i in range(20)), "train/d_loss"]
    for step in (0, 10):
        log.write(step, 0.1, lines({name: np.arange(1.0, 1.0 + seeds) + i for i, name in enumerate(names)}, members))
    draw(log.path, tmp_path / "curves.png")
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(panels) == ["loss", "norm", "d_loss"]
    assert [line.get_label() for line in panels["loss"].lines] == ["train/loss", "val/loss"]
    assert [line.get_label() for line in panels["norm"].lines] == ["train/norm", *(f"layer_{i}" for i in range(20))]
    # Of layer 2, the sixth metric: the mean of 6 and, with a second replica, 7.
    assert list(panels["norm"].lines[3].get_ydata()) == [6.0 if seeds == 1 else 6.5] * 2
    assert [axes.get_yscale() for axes in panels.values()] == ["linear", "log", "linear"]
    legend = [text.get_text() for text in panels["norm"].get_legend().get_texts()]
    assert len(legend) == 12 and legend[0] == "train/norm" and legend[-1] == "layer_19"
    assert len({line.get_color() for line in panels["norm"].lines}) == 21
