"""Where the kernels run in this process: on a GPU, in Triton's interpreter, or nowhere.

Imported before `hsa.kernels`, which a checkout that is not installed keeps in the folder kernels/. The modules that
run on a GPU need pytest, torch, triton, numpy, safetensors and transformers, and nothing else.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

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
