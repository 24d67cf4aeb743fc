"""Python, this package's own parts, the libraries it needs, PyTorch with its GPUs, and Warp."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navagent.doctor.child import Answer, ask
from navagent.doctor.findings import Finding
from navagent.installation import ShadowedPackageError, check_packages

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OLDEST_PYTHON = (3, 11)
"""As ``requires-python`` in pyproject.toml, which a checkout that was never installed cannot tell."""

INSTALL = "python -m pip install --constraint constraints.txt ."
"""How this package and what it needs are installed, from a clone."""

MODULES = {
    "warp-lang": "warp",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "hydra-core": "hydra",
    "pyyaml": "yaml",
}
"""Modules of the distributions that are not called as these are."""

SLOW = ("transformers", "peft")
"""Distributions that take longest to import, apart from all others together."""


def python() -> Iterable[Finding]:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding(
            "Python",
            "problem",
            f"{version}, needs {wanted} or newer",
            f"make an environment of Python {wanted}",
        )
    elif sys.maxsize < 2**32:
        yield Finding("Python", "problem", f"{version} of 32 bits", "install Python for 64 bits")
    else:
        yield Finding("Python", "ok", f"{version}, {sys.executable}")


def own_packages() -> Iterable[Finding]:
    """Whether other packages of the same names hide ours."""
    try:
        check_packages()
    except ShadowedPackageError as error:
        yield Finding("navagent", "problem", str(error), "rename it, or run from another folder")
        return
    folder = Path(__file__).resolve().parents[1]
    try:
        yield Finding("navagent", "ok", f"{metadata.version('navagent')}, {folder}")
    except metadata.PackageNotFoundError:
        yield Finding("navagent", "warning", f"{folder} is not installed, so no versions are known", INSTALL)


def required(distribution: str, extra: str = "") -> list[Requirement]:
    """What an installed distribution requires on this machine, of itself or by one of its extras.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
        ImportError: the library ``packaging`` is missing.
    """
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None:
            applies = not extra
        else:
            applies = marker.evaluate({"extra": extra}) and (not extra or not marker.evaluate({"extra": ""}))
        if applies:
            found.append(requirement)
    return found


def unmet(requirement: Requirement) -> str:
    """What is there instead of a requirement; empty where it is met."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed"
    return ""


def libraries() -> Iterable[Finding]:
    """The libraries that this package requires import, in versions that fit, and PyTorch and Warp compute.

    They share processes, since importing PyTorch takes longest of all this.
    """
    wanted: list[Requirement] = []
    try:
        wanted = required("navagent")
    except metadata.PackageNotFoundError:
        pass  # own_packages() says so
    except ImportError as error:
        yield Finding("libraries", "problem", str(error), INSTALL)
    modules = [module_of(each) for each in wanted]
    groups = [
        [*(f"import:{name}" for name in modules if name not in SLOW), "torch", "driver", "warp"],
        [f"import:{name}" for name in modules if name in SLOW],
    ]
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(len(groups)) as pool:
        for answered in pool.map(lambda group: ask(*group), groups):
            answers |= answered
    yield from judge_libraries(wanted, answers)
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    yield judge_accelerator(answers["torch"], answers["driver"].facts.get("cuda"), gpus)
    yield judge_warp(answers["warp"])


def module_of(requirement: Requirement) -> str:
    """The module that a distribution is imported by."""
    return MODULES.get(requirement.name, requirement.name.replace("-", "_"))


def judge_libraries(wanted: Sequence[Requirement], answers: Mapping[str, Answer]) -> Iterable[Finding]:
    """What to say of required distributions, whose imports were answered as ``import:MODULE``."""
    sound = 0
    for requirement in wanted:
        fault = unmet(requirement)
        error = answers[f"import:{module_of(requirement)}"].error
        if fault:
            mend = f'python -m pip install "{requirement}"'
            yield Finding(requirement.name, "problem", f"{fault}, needs {requirement}", mend)
        elif error:
            mend = f'python -m pip install --force-reinstall --no-deps "{requirement}"'
            yield Finding(requirement.name, "problem", f"importing it fails: {error}", mend)
        else:
            sound += 1
    if wanted and sound == len(wanted):
        yield Finding("libraries", "ok", f"all {sound} required ones import, in versions that fit")
    yield from _several_opencv()


def _several_opencv() -> Iterable[Finding]:
    """OpenCV comes as several distributions that overwrite each other's files."""
    names = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
    others = [name for name in names if _installed(name)]
    if others and _installed("opencv-python-headless"):
        found = f"opencv-python-headless and {', '.join(others)} write the same files"
        mend = (
            f"python -m pip uninstall {' '.join(others)}; "
            "python -m pip install --force-reinstall --no-deps opencv-python-headless"
        )
        yield Finding("OpenCV", "warning", found, mend)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def judge_accelerator(torch: Answer, driver: Sequence[int] | None, gpus: int) -> Finding:
    """What to say of a machine.

    Args:
        torch: the answer of :func:`navagent.doctor.probe.torch_devices`.
        driver: newest CUDA that the NVIDIA driver runs, (major, minor); None where there is no driver.
        gpus: NVIDIA GPUs that the kernel knows.
    """
    name = "PyTorch"
    if torch.error:
        return Finding(name, "problem", torch.error, f"install it again: {INSTALL}")
    facts = torch.facts
    build = f"{facts['version']}" + (f" for CUDA {facts['cuda']}" if facts["cuda"] else ", for the CPU alone")
    known = "" if driver is None else f"; the driver runs CUDA up to {driver[0]}.{driver[1]}"
    if facts["available"]:
        return _judge_devices(facts, build, known)
    if not gpus and driver is None:
        return Finding(name, "ok", f"{build}; no NVIDIA GPU here, the CPU does everything")
    there = f"{build}{known}; {gpus} NVIDIA GPU{'s' * (gpus != 1)} here, none used"
    if not facts["cuda"]:
        mend = "install a build for CUDA: https://pytorch.org/get-started says the command"
        return Finding(name, "warning", there, mend)
    if driver is None:
        mend = "install the driver; start a container with `--gpus all` and the NVIDIA container toolkit"
        return Finding(name, "problem", f"{there}: libcuda.so.1 does not load", mend)
    if driver[0] < int(facts["cuda"].partition(".")[0]):
        mend = f"update the NVIDIA driver, or install a build of PyTorch for CUDA {driver[0]}"
        return Finding(name, "problem", f"{there}: the driver is older than the build needs", mend)
    said = "; ".join(facts["said"]) or "PyTorch does not say why"
    mend = "look whether `nvidia-smi` works and CUDA_VISIBLE_DEVICES hides the GPU"
    return Finding(name, "warning", f"{there}: {said}", mend)


def _judge_devices(facts: Mapping[str, Any], build: str, known: str) -> Finding:
    listed = []
    for index, device in enumerate(facts["devices"]):
        major, minor = device["capability"]
        what = f"cuda:{index} {device['name']}"
        if device.get("error") or device.get("sum") != 16.0:
            compiled = ", ".join(facts["architectures"])
            found = f"{build}{known}; {what} fails: {device.get('error', 'wrong sums')}"
            mend = (
                f"it has capability sm_{major}{minor} and the build has code for {compiled}: install a build "
                "that has it, or end what fills the GPU's memory"
            )
            return Finding("PyTorch", "problem", found, mend)
        listed.append(f"{what}, {device['free'] / 2**30:.0f} of {device['memory'] / 2**30:.0f} GB free")
    return Finding("PyTorch", "ok", "; ".join([build + known, *listed]))


def judge_warp(answer: Answer) -> Finding:
    """Whether Warp compiles and runs a kernel, as the simulator needs."""
    if answer.error:
        again = re.search(r"No module named|killed by", answer.error)
        mend = (
            f"install it again: {INSTALL}"
            if again
            else "name a folder that can be written by WARP_CACHE_PATH"
        )
        return Finding("Warp", "problem", f"no kernel runs: {answer.error}", mend)
    facts = answer.facts
    if facts["sum"] != 8.0:
        return Finding("Warp", "problem", "a kernel computes wrong sums", f"install it again: {INSTALL}")
    return Finding("Warp", "ok", f"{facts['version']} runs a kernel on the CPU, kept in {facts['cache']}")
