import math

import pytest

from envs.simulators.base import AgentSpec, SensorSpec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("radius", 0.0),
        ("radius", math.nan),
        ("height", -1.0),
        ("forward_step", math.inf),
        ("turn_angle_deg", 0.0),
        ("max_climb", -0.1),
        ("max_climb", math.nan),
        ("max_slope_deg", 91.0),
        ("max_slope_deg", math.nan),
    ],
)
def test_impossible_bodies_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"agent {field} {value} must"):
        AgentSpec(**{field: value})


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"kind": "sonar"}, "kind 'sonar' is not one of rgb"),
        ({"height": 0}, "0x128 must be at least 1x1"),
        ({"hfov_deg": 180.0}, "hfov_deg 180.0 must lie between 0 and 180"),
        ({"hfov_deg": math.nan}, "hfov_deg nan"),
        ({"sensor_height": math.nan}, "sensor_height nan must be a number"),
        ({"pitch_deg": math.inf}, "pitch_deg inf must be a number"),
    ],
)
def test_impossible_cameras_are_refused_by_name(settings, fault):
    with pytest.raises(ValueError, match=f"sensor 'front': .*{fault}"):
        SensorSpec(**{"name": "front", "kind": "rgb"} | settings)
