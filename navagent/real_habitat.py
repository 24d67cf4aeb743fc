"""Real Habitat, imported where it is installed and missed with what to do where it is not."""

from __future__ import annotations

import contextlib
import io
import os


class HabitatMissingError(ImportError):
    """habitat-sim or habitat-lab is missing or broken."""

    package: str
    """Which of them: ``habitat-sim`` or ``habitat-lab``."""

    def __init__(self, package: str, error: Exception) -> None:
        self.package = package
        super().__init__(
            f"{package} is needed and does not import here ({type(error).__name__}: {error}); `navagent "
            "doctor` says what is wrong, and docs/habitat.md how to install it"
        )


def import_habitat(lab: bool = True) -> None:
    """Imports habitat-sim, and habitat-lab where ``lab``, with little to say.

    Raises:
        HabitatMissingError: one of them is missing or broken; in its words, and with what to do.
    """
    quiet = {
        "HABITAT_SIM_LOG": "quiet",
        "MAGNUM_LOG": "quiet",
        "GLOG_minloglevel": "2",
        "HABITAT_LAB_LOG": "30",
    }
    for name, level in quiet.items():
        os.environ.setdefault(name, level)
    package = "habitat-sim"
    try:
        # The old gym of habitat-lab greets with a notice.
        with contextlib.redirect_stderr(io.StringIO()):
            import habitat_sim

            habitat_sim.Simulator  # noqa: B018
            if lab:
                package = "habitat-lab"
                import habitat

                habitat.Env  # noqa: B018
    except Exception as error:  # an installation that is broken raises anything
        raise HabitatMissingError(package, error) from None
