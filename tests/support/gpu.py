"""Where the kernels run in this process: on a GPU, in Triton's interpreter, or nowhere.

Imported before `hsa.kernels`, which a checkout that is not installed keeps in the folder kernels/. The modules that
run on a GPU need pytest, torch, triton, numpy, safetensors and transformers, and nothing else.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sampling import EVERYTHING

import hsa

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

NO_GPU = ""
"""Why nothing can run on a GPU in this process; empty where it can."""
if INTERPRETED:
    NO_GPU = "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it for a GPU"
elif not torch.cuda.is_available():
    NO_GPU = f"torch {torch.__version__} finds no GPU"

NO_DEVICE = "" if INTERPRETED or not NO_GPU else f"{NO_GPU}; test_process runs this module interpreted"
"""Why no kernel can run in this process; empty where one can."""

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("hsa.kernels") is None:
    hsa.__path__.append(str(ROOT))


def patch_once_a_launch() -> None:
    """Spare Triton's interpreter more than half of its work: at every call of a device function it patches
    `triton.language` again, where the launch has patched it already."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[int] = set()

    @cache
    def seen_by(function: Any) -> set[int]:
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        return modules & {id(tl), id(tl.core)}

    def patch_unless_patched(function: Any) -> Any:
        seen = seen_by(function)
        if seen <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not patched:
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        patched.update(seen)
        return scope

    interpreter._patch_lang = patch_unless_patched


if INTERPRETED and not EVERYTHING:
    patch_once_a_launch()
