import cv2
import numpy as np
import pytest

from navagent.evaluation.curves import DARK, LIGHT, draw_curves, series
from navagent.evaluation.metrics import summarise


def test_series_skips_records_without_a_finite_number(run):
    frames, values = series(run.read_metrics(), "eval/success")
    assert frames.tolist() == [5000, 10000]
    assert values.tolist() == [0.4, 0.4]
    assert len(series(run.read_metrics(), "train/entropy")[0]) == 0
    assert len(series([{"frames": 1, "x": "text"}, {"frames": 2, "x": None}], "x")[0]) == 0


@pytest.mark.parametrize(("theme", "bright"), [(LIGHT, True), (DARK, False)])
def test_curves_are_a_picture_in_the_themes_colours(run, make_result, tmp_path, theme, bright):
    baselines = {"random": summarise([make_result(n, success=False, spl=0.0) for n in range(3)])}
    draw_curves(run.read_metrics(), tmp_path / "curves.png", baselines, theme)
    image = cv2.imread(str(tmp_path / "curves.png"))
    assert image.shape[1] > 1000
    assert (np.median(image) > 128) == bright


def test_lines_show_where_the_metrics_have_numbers(run, tmp_path):
    """More kinds of measures give more panels, and so a larger picture."""
    few = [{"frames": 1, "rollout/success": 0.1}, {"frames": 2, "rollout/success": 0.2}]
    draw_curves(few, tmp_path / "few.png")
    draw_curves(run.read_metrics(), tmp_path / "many.png")
    few, many = (cv2.imread(str(tmp_path / name)) for name in ("few.png", "many.png"))
    assert many.size > 3 * few.size


def test_a_run_without_metrics_still_gets_a_picture(tmp_path):
    draw_curves([], tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")) is not None
