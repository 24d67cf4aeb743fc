import cv2
import numpy as np
import pytest

from navagent.evaluation.video import FRAMES_PER_SECOND, SUFFIX, depth_picture, fitted, frame, write_video


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (answer := capture.read())[0]:
        frames.append(cv2.cvtColor(answer[1], cv2.COLOR_BGR2RGB))
    return capture, frames


def test_a_video_plays_back_what_was_written(tmp_path):
    frames = [np.full((64, 96, 3), (20 * index, 100, 200 - 15 * index), np.uint8) for index in range(10)]
    path = tmp_path / f"video{SUFFIX}"
    write_video(iter(frames), path)
    capture, seen = read_video(path)
    assert len(seen) == 10
    assert capture.get(cv2.CAP_PROP_FPS) == FRAMES_PER_SECOND
    for ours, theirs in zip(frames, seen, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 6
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_video_is_vp9_in_mp4_which_browsers_play(tmp_path):
    path = tmp_path / f"video{SUFFIX}"
    write_video([np.zeros((32, 32, 3), np.uint8)] * 3, path)
    data = path.read_bytes()
    assert data[4:8] == b"ftyp"
    assert b"vp09" in data


@pytest.mark.parametrize(
    ("shapes", "message"),
    [([], "at least one frame"), ([(33, 32, 3)], "must be even"), ([(32, 32, 3), (32, 34, 3)], "after")],
)
def test_frames_that_make_no_video_are_refused_and_leave_nothing(tmp_path, shapes, message):
    with pytest.raises(ValueError, match=message):
        write_video((np.zeros(shape, np.uint8) for shape in shapes), tmp_path / f"video{SUFFIX}")
    assert not list(tmp_path.iterdir())


def test_a_frame_holds_its_panels_side_by_side_over_the_caption():
    red, green = np.full((10, 10, 3), (200, 0, 0), np.uint8), np.full((10, 20, 3), (0, 200, 0), np.uint8)
    picture = frame([("", red), ("", green)], "caption", "verdict", size=120)
    assert picture.shape[0] % 2 == 0
    assert picture.shape[1] % 2 == 0
    assert picture[70, 60].tolist() == [200, 0, 0]
    assert picture[74, 14 + 120 + 12 + 60].tolist() == [0, 200, 0]
    assert picture[16, 14 + 120 + 12 + 60].tolist() == [255, 255, 255], "a wide panel keeps its shape"
    assert (picture[140:] < 100).any(), "there is text below"


def test_fitted_keeps_the_shape_and_fills_one_side():
    image = fitted(np.zeros((30, 60, 3), np.uint8), 100, 100)
    dark = (image < 128).all(axis=2)
    assert dark.any(axis=0).sum() == 100
    assert dark.any(axis=1).sum() == 50


def test_depth_gets_darker_with_distance_and_grey_where_nothing_was_hit():
    picture = depth_picture(np.array([[0.5, 4.0, 9.0, 0.0]], np.float32))
    brightness = picture[0, :3].astype(int).sum(axis=1)
    assert brightness[0] > brightness[1] > brightness[2]
    assert picture[0, 3].tolist() == [150, 150, 150]
