"""The whole of it, in small: simulator, task, expert, policy, imitation and PPO learn to navigate a room."""

import pytest
from one_room import write_one_room

from navagent.config import load_config
from navagent.runs import Run
from navagent.train import train


@pytest.mark.timeout(900)
def test_imitation_then_ppo_reach_nine_in_ten_in_a_room(tmp_path):
    write_one_room(tmp_path / "room", num_val=100)
    run = train(
        load_config(
            [
                f"scenes.dataset={tmp_path / 'room'}",
                f"run_dir={tmp_path / 'run'}",
                "sensors.height=32",
                "sensors.width=32",
                "env.max_steps=100",
                "encoder.weights=random",
                "algorithm.total_frames=28672",
                "imitation.frames=14336",
                "algorithm.num_envs=16",
                "algorithm.num_steps=32",
                "algorithm.num_minibatches=2",
                "algorithm.epochs=3",
                "algorithm.learning_rate=2e-3",
                "algorithm.curriculum=none",
                "evaluation.every_frames=28672",
                "evaluation.num_episodes=100",
                "evaluation.final_episodes=0",
            ]
        )
    )
    records = Run(run.path).read_metrics()
    phases = [record["rollout/phase"] for record in records if "rollout/phase" in record]
    assert phases == ["imitation"] * 28 + ["ppo"] * 28
    [evaluation] = [record for record in records if "eval/success" in record]
    assert evaluation["eval/success"] >= 0.9
    assert evaluation["eval/spl"] >= 0.8
