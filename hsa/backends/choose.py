"""Choose the backend of a merge."""

from __future__ import annotations

import re
from pathlib import Path

from hsa.backends.base import Backend
from hsa.errors import BackendUnavailable, RequestError, shown
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.option_names import option

BACKENDS = ("auto", "cpu", "triton")

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's and AMD's drivers, and of either under WSL."""


_NUMBERED = re.compile(r"cuda:[0-9]{1,3}")


def resolve(name: str, device: str, settings: Settings, models: int) -> Backend:
    """Return the backend of that name for a merge of this many models.

    Only `auto` chooses; a backend requested by name that is not available is an error.

    Raises BackendUnavailable, or RequestError for an unknown name or numerics that a backend does not offer.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise RequestError(f"{option('backend')} must be one of {', '.join(BACKENDS)}, got {shown(name)}")
    if not isinstance(device, str) or not (device in ("auto", "cpu", "cuda") or _NUMBERED.fullmatch(device)):
        raise RequestError(f"{option('device')} must be the text auto, cpu, cuda or cuda:N, got {shown(device)}")
    on_gpu = name == "triton" or device.startswith("cuda")
    method = method_named(settings.method)
    if not method.elementwise and on_gpu:
        raise RequestError(
            f"numerics 'reference' repeats the script's torch operations on the CPU; use {option('backend', 'cpu')}"
        )
    if on_gpu and method.gpu_models is None:
        raise RequestError(f"method {method.name} is computed on the CPU; use {option('backend', 'cpu')}")
    fused = method.gpu_models == models
    if on_gpu and not fused:
        raise RequestError(
            f"a GPU merges {method.gpu_models} models by method {method.name}, and {models} are given, which are "
            f"merged on the CPU; use {option('backend', 'cpu')}"
        )
    if name == "cpu" and on_gpu:
        raise RequestError(f"backend 'cpu' has no device {shown(device)}; use {option('backend', 'triton')} or auto")
    if on_gpu or (name == "auto" and device == "auto" and fused and _sees_gpu()):
        return _triton(device)
    if not method.elementwise:
        try:
            from hsa.backends.torch_cpu import ScriptBackend
        except ImportError as error:
            raise BackendUnavailable(
                f"numerics 'reference' needs torch, which cannot be imported: {error}; install torch, or use numerics "
                f"'exact'"
            ) from error
        return ScriptBackend()
    from hsa.backends.cpu import CpuBackend

    return CpuBackend()


def _sees_gpu() -> bool:
    """Whether a GPU's device file exists and torch can use the GPU; torch is only imported if the file exists."""
    if not any(Path(file).exists() for file in GPU_FILES):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _triton(device: str) -> Backend:
    try:
        from hsa.backends.triton import TritonBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"backend 'triton' cannot be imported: {error}; install triton, or use {option('backend', 'cpu')}"
        ) from error
    return TritonBackend(device)
