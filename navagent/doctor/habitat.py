"""habitat-sim and habitat-lab, what they pin, and the EGL devices that habitat-sim renders on.

Neither is needed: the built-in simulator reads Habitat's scenes and episodes by itself. Where they are there,
they should work, and what their errors mean is known here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from navagent.doctor.child import Answer, ask
from navagent.doctor.findings import Finding
from navagent.doctor.software import required, unmet

if TYPE_CHECKING:
    from navagent.config import TrainConfig

PACKAGES = {"habitat-sim": "habitat_sim", "habitat-lab": "habitat"}
"""Habitat's distributions and their modules."""


@dataclass(frozen=True)
class Known:
    """An error of Habitat's installation that users meet."""

    pattern: str
    """Regular expression that finds it in what was said."""
    meaning: str
    """What it means."""
    mend: str
    """What to do."""


KNOWN: tuple[Known, ...] = (
    Known(
        r"lib(EGL|GL|OpenGL|GLX|GLdispatch)\.so\S*: cannot open shared object",
        "the system has no OpenGL and EGL libraries",
        "apt-get install libegl1 libgl1 libopengl0, or your system's libglvnd",
    ),
    Known(
        r"GLIBCXX_\S+'? not found",
        "an older C++ library is loaded before the one habitat-sim was built with",
        "conda install -c conda-forge libstdcxx-ng, and start Python without LD_LIBRARY_PATH",
    ),
    Known(
        r"compiled using NumPy 1|_ARRAY_API not found|numpy\.dtype size changed|multiarray failed to import",
        "a package was built for another NumPy than the one installed",
        "install a build of that package for this NumPy: habitat-sim up to 0.3.3 wants numpy<2, newer ones "
        "numpy>=2",
    ),
    Known(
        r"module 'cv2' has no attribute",
        "habitat-lab is older than this OpenCV, and does not import with OpenCV 5",
        'python -m pip install "opencv-python-headless<5"',
    ),
    Known(
        r"No module named '(magnum|corrade)'",
        "habitat-lab is there without habitat-sim, whose libraries it imports",
        "install habitat-sim into the same environment, see docs/habitat.md",
    ),
    Known(
        r"No module named 'habitat_sim\._ext|undefined symbol",
        "habitat-sim's compiled part is missing, or is of another Python",
        "install the build of habitat-sim for this version of Python, see docs/habitat.md",
    ),
    Known(
        r"No module named '(faster_fifo|torchvision|webdataset)'",
        "habitat-baselines imports a package that its installation did not bring",
        "python -m pip install the package; nothing in navagent needs habitat-baselines",
    ),
    Known(
        r"EGL_BAD_ALLOC",
        "no memory is left for drawing",
        "fewer simulator.workers or simulator.resident_scenes; see the line on memory, and ulimit -v",
    ),
    Known(
        r"unable to find (CUDA|EGL) device|no EGL devices found|Unable to create windowless context",
        "habitat-sim finds no device to render on",
        "see the line on EGL; in a container NVIDIA_DRIVER_CAPABILITIES must hold graphics",
    ),
    Known(
        r"DISPLAY not detected|DISPLAY environment variable is missing|Could not initialize GLFW",
        "this build of habitat-sim opens a window, and there is no display",
        "install the headless build of habitat-sim",
    ),
)
"""Errors by what they say; the first that fits counts."""


def explain(words: str) -> Known | None:
    """The known error that is in some program's words, if one is."""
    return next((known for known in KNOWN if re.search(known.pattern, words)), None)


def habitat() -> Iterable[Finding]:
    """Whether Habitat's packages import, and which of their pins are not met."""
    for name, module in PACKAGES.items():
        if find_spec(module) is None:
            found = (
                "not installed, and not needed: the built-in simulator reads Habitat's scenes and episodes"
            )
            yield Finding(name, "ok", found)
        else:
            # Each in a process of its own: what one has loaded must not decide what another finds.
            task = f"import:{module}"
            yield judge_package(name, ask(task)[task], unmet_pins(name))


def judge_package(name: str, answer: Answer, pins: Iterable[str]) -> Finding:
    """What to say of one of Habitat's packages: how its import went, and which of its pins are not met."""
    broken = "; ".join(pins)
    if answer.error:
        known = explain(answer.error)
        if known is None:
            mend = "install it again into a fresh environment, see docs/habitat.md"
            return Finding(name, "problem", "; ".join(filter(None, (answer.error, broken))), mend)
        return Finding(name, "problem", f"{known.meaning}: {answer.error}", known.mend)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = answer.facts.get("version") or "of unknown version"
    if broken:
        mend = (
            "it imports all the same; Habitat's two packages contradict each other, so keep what habitat-sim "
            "wants and install habitat-lab with --no-deps"
        )
        return Finding(name, "warning", f"{version}; pins that are not met: {broken}", mend)
    return Finding(name, "ok", f"{version}, {answer.facts.get('file')}")


def unmet_pins(distribution: str) -> list[str]:
    """What an installed distribution requires and does not find here, each with what is there instead."""
    try:
        wanted = required(distribution)
    except (metadata.PackageNotFoundError, ImportError):
        return []
    # Any of OpenCV's distributions brings the module.
    return [f"{each} ({fault})" for each in wanted if (fault := unmet(each)) and each.name != "opencv-python"]


def drawing(config: TrainConfig) -> Iterable[Finding]:
    """Whether habitat-sim starts as ``simulator=habitat`` starts it, where it is chosen or installed here."""
    from navagent.build import check_simulator, own_cores, simulator_gpus
    from navagent.config import ConfigError

    simulator = config.simulator
    if simulator.name != "habitat" and find_spec("habitat_sim") is None:
        return
    config = dataclasses.replace(config, simulator=dataclasses.replace(simulator, name="habitat"))
    name = "simulator=habitat"
    try:
        check_simulator(config)
    except ConfigError as error:
        words = str(error).removeprefix(f"{name}: ")
        known = explain(words)
        if known is None:
            yield Finding(name, "problem", words, "see the lines on habitat-sim and EGL, and docs/habitat.md")
        else:
            yield Finding(name, "problem", f"{known.meaning}: {words}", known.mend)
        return
    gpus = simulator_gpus(config, simulator.workers or own_cores())
    where = "on " + ", ".join("the processor" if gpu < 0 else f"GPU {gpu}" for gpu in sorted(set(gpus)))
    by = "" if simulator.python is None else f", by {simulator.python}"
    yield Finding(name, "ok", f"a worker starts and draws {where}{by}")


def egl() -> Iterable[Finding]:
    """What habitat-sim could render on without a display."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    yield judge_egl(ask("egl")["egl"], gpus, find_spec("habitat_sim") is not None, os.environ)


def judge_egl(answer: Answer, gpus: int, wanted: bool, environment: Mapping[str, str]) -> Finding:
    """What to say of a machine's EGL devices.

    Args:
        answer: of :func:`navagent.doctor.probe.egl_devices`.
        gpus: NVIDIA GPUs that the kernel knows.
        wanted: whether habitat-sim is installed, which alone needs them.
        environment: variables of this process.
    """
    if answer.error:
        known = explain(answer.error)
        words = f"{known.meaning}: {answer.error}" if known else answer.error
        if not wanted:
            return Finding("EGL", "ok", f"none, which habitat-sim would need ({answer.error})")
        mend = known.mend if known else "install your GPU's driver with its EGL library"
        return Finding("EGL", "problem", words, mend)
    devices = answer.facts["devices"]
    listed = ", ".join(
        f"CUDA {device['cuda']}"
        if device["cuda"] is not None
        else "software"
        if device["software"]
        else "a GPU without CUDA"
        for device in devices
    )
    found = f"{len(devices)} device{'s' * (len(devices) != 1)}: {listed or 'none'}"
    if gpus and not any(device["cuda"] is not None for device in devices):
        capabilities = environment.get("NVIDIA_DRIVER_CAPABILITIES", "")
        if capabilities and not {"all", "graphics"} & set(capabilities.split(",")):
            mend = f"NVIDIA_DRIVER_CAPABILITIES={capabilities} lacks graphics: start the container with all"
        else:
            mend = (
                "the driver's libEGL_nvidia.so.0, or /usr/share/glvnd/egl_vendor.d/10_nvidia.json that names "
                "it, is missing: install the driver with its OpenGL files, or set "
                "__EGL_VENDOR_LIBRARY_FILENAMES to a copy of that file"
            )
        level = "problem" if wanted else "warning"
        return Finding("EGL", level, f"{found}, but none is the NVIDIA GPU", mend)  # type: ignore[arg-type]
    if wanted and not devices:
        mend = "install your GPU's driver, or libegl-mesa0 to render in software"
        return Finding("EGL", "problem", found, mend)
    return Finding("EGL", "ok", found)
