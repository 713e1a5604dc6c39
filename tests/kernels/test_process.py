"""The kernels in processes of their own: Triton decides at import whether it interprets or compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run

pytestmark = pytest.mark.long

KERNELS = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs those modules itself")
@pytest.mark.parametrize("module", ["test_merge.py", "test_refusals.py", "test_interleaved.py"])
def test_interpreted_modules_pass(module: str) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS / module), interpret=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_the_package_imports_neither_torch_nor_triton() -> None:
    done = run("-c", "import sys, hsa.kernels; print(sorted({'torch', 'triton'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_cpu_tensor_is_refused_where_kernels_are_compiled() -> None:
    done = run(
        "-c",
        "import torch\n"
        "from hsa.kernels.projections import KernelInputError, Projections\n"
        "x = torch.zeros(64, 64)\n"
        "try:\n"
        "    Projections([x], [x.clone()], [x.clone()], heads=1)\n"
        "except KernelInputError as error:\n"
        "    print(error)\n",
    )
    assert done.stdout.strip() == "base[0]: expected a tensor on device cuda, found cpu", done.stderr
