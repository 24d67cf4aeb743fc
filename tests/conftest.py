import os
from pathlib import Path

import pytest

# Two test processes on a two-core machine must not start a thread pool each, and xdist's workers are two.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# As navagent sets it, but before any test has loaded torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _shared(name: str, variable: str) -> Path:
    folder = Path(os.environ.get(variable, Path(__file__).resolve().parents[2] / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"no {name} recordings at {folder}; set {variable} to their folder")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Recordings of real Habitat: scenes, pixels, distances, moves and episode traces."""
    return _shared("reference", "NAVAGENT_REFERENCE")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Checkpoint files as their authors published them."""
    return _shared("weights", "NAVAGENT_WEIGHTS")
