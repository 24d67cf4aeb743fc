"""Runs in a process of its own, where a crash harms nothing: imports packages and asks drivers.

Started by :func:`navagent.doctor.child.ask` as a script, with only the standard library at hand. It writes
one JSON object a line to the file descriptor that it is given: ``{"begin": TASK}`` before a task, then
``{"done": TASK, "facts": {...}}`` or ``{"done": TASK, "error": TEXT}``. Standard output and error belong to
the packages, which may print there, from C too.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]


def import_package(name: str) -> Facts:
    """Imports a package; gives its version and file."""
    module = importlib.import_module(name)
    version = getattr(module, "__version__", None)
    return {"version": None if version is None else str(version), "file": getattr(module, "__file__", None)}


def torch_devices() -> Facts:
    """What PyTorch was built for, and what it finds and can use of it."""
    import torch

    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        said += [str(warning.message).splitlines()[0] for warning in caught]
    devices = []
    for index in range(torch.cuda.device_count() if available else 0):
        properties = torch.cuda.get_device_properties(index)
        device: Facts = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory": properties.total_memory,
        }
        try:
            device["free"] = torch.cuda.mem_get_info(index)[0]
            device["sum"] = float((torch.ones(8, device=f"cuda:{index}") + 1).sum())
        except RuntimeError as error:
            device["error"] = str(error).splitlines()[0]
        devices.append(device)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "available": available,
        "architectures": torch.cuda.get_arch_list() if available else [],
        "said": said,
        "devices": devices,
        "threads": torch.get_num_threads(),
    }


def cuda_driver() -> Facts:
    """The newest CUDA that the NVIDIA driver runs, as [major, minor]; nothing where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return {"error": "libcuda.so.1 does not tell its version"}
    return {"cuda": [version.value // 1000, version.value % 1000 // 10]}


def warp_kernel() -> Facts:
    """Compiles a small Warp kernel and runs it on the CPU, as the simulator does its own."""
    import warp as wp

    wp.config.quiet = True  # type: ignore[attr-defined]
    wp.config.log_level = 30
    globals()["wp"] = wp  # where Warp looks for the names in the kernel's annotations

    @wp.kernel
    def add_one(values: wp.array(dtype=float)) -> None:
        index = wp.tid()
        values[index] = values[index] + 1.0

    values = wp.zeros(8, dtype=float, device="cpu")
    wp.launch(add_one, dim=8, inputs=[values], device="cpu")
    return {
        "version": wp.__version__,
        "sum": float(values.numpy().sum()),
        "cache": wp.config.kernel_cache_dir,
    }


_EGL_EXTENSIONS = 0x3055
_EGL_CUDA_DEVICE = 0x323A


def egl_devices() -> Facts:
    """The devices that headless rendering can choose from: for each, its CUDA number or that it is software.

    Raises:
        OSError: the EGL library is not there.
    """
    egl = ctypes.CDLL("libEGL.so.1")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]

    def function(name: bytes, result: Any, *arguments: Any) -> Any:
        address = egl.eglGetProcAddress(name)
        if not address:
            raise OSError(f"the EGL library lacks {name.decode()}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    pointer, count = ctypes.c_void_p, ctypes.c_int(0)
    query = function(
        b"eglQueryDevicesEXT",
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.POINTER(pointer),
        ctypes.POINTER(ctypes.c_int),
    )
    words = function(b"eglQueryDeviceStringEXT", ctypes.c_char_p, pointer, ctypes.c_int)
    number = function(
        b"eglQueryDeviceAttribEXT", ctypes.c_uint, pointer, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t)
    )
    if not query(0, None, ctypes.byref(count)):
        raise OSError("eglQueryDevicesEXT failed")
    found = (pointer * max(1, count.value))()
    query(count.value, found, ctypes.byref(count))
    devices = []
    for device in found[: count.value]:
        extensions = (words(device, _EGL_EXTENSIONS) or b"").decode().split()
        cuda = ctypes.c_ssize_t(-1)
        if "EGL_NV_device_cuda" in extensions:
            number(device, _EGL_CUDA_DEVICE, ctypes.byref(cuda))
        devices.append(
            {
                "cuda": cuda.value if cuda.value >= 0 else None,
                "software": "EGL_MESA_device_software" in extensions,
            }
        )
    return {"devices": devices}


def data(settings: str) -> Facts:
    """What there is to say of the data that settings name, a JSON list as ``navagent train`` takes them."""
    from navagent.doctor.data import look

    return look(json.loads(settings))


TASKS: dict[str, Callable[..., Facts]] = {
    "import": import_package,
    "torch": torch_devices,
    "driver": cuda_driver,
    "warp": warp_kernel,
    "egl": egl_devices,
    "data": data,
}
"""What can be asked: NAME, or with an argument ``import:PACKAGE`` and ``data:SETTINGS``."""


def main(descriptor: int, tasks: list[str]) -> None:
    """Carries out tasks, one after another, and tells of each."""
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as answers:
        for task in tasks:
            print(json.dumps({"begin": task}), file=answers)
            kind, _, argument = task.partition(":")
            try:
                answer: Facts = {"facts": TASKS[kind](*filter(None, (argument,)))}
            except BaseException as error:  # packages may exit, too
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"done": task, **answer}), file=answers)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
