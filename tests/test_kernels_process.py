"""The kernels in processes of their own: Triton decides at import whether it interprets or compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(*arguments: str, interpret: bool = False, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=TESTS.parent,
        check=False,
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs those modules itself")
@pytest.mark.parametrize("module", ["test_kernels_merge.py", "test_kernels_refusals.py"])
def test_interpreted_modules_pass(module: str) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / module), interpret=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_every_kernel_compiles_for_every_target() -> None:
    done = run("-m", "hsa.kernels.compile_check")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for kernel in ("fused", "score", "apply"):
            mixes = {row[2] for row in rows if row[:2] == [target, kernel] and row[-1] == "ok"}
            assert len(mixes) == 9, (target, kernel, mixes)


def test_the_compile_check_refuses_bad_code() -> None:
    done = run(
        "-c",
        "from dataclasses import replace\n"
        "from hsa.kernels import compile_check as c\n"
        "every = list(c.cases())\n"
        "def pick(target, **wanted):\n"
        "    return next(x for x in every if x.target == target and x.kernel == 'apply' and x.mix == 'float16'\n"
        "                and all(getattr(x, key) == value for key, value in wanted.items()))\n"
        "plain = pick('sm_90', aligned=True)\n"
        "print('plain', c.compile_case(plain).refusals)\n"
        "print('fused', c.compile_case(plain, enable_fp_fusion=True).refusals)\n"
        "print('amd-fused', c.compile_case(pick('gfx942', aligned=True), enable_fp_fusion=True).refusals)\n"
        "print('few', c.compile_case(plain, maxnreg=24).refusals)\n"
        "for name, judge in (('sm_90', '_judge_cuda'), ('gfx942', '_judge_amd')):\n"
        "    real = getattr(c, judge)\n"
        "    setattr(c, judge, lambda asm, aligned, real=real: real(asm, True))\n"
        "    print('narrow', name, c.compile_case(pick(name, aligned=False)).refusals)\n",
    )
    assert done.returncode == 0, done.stderr
    plain, fused, amd, few, cuda, gfx = done.stdout.splitlines()
    assert plain == "plain ()"
    assert "fused multiply-adds" in fused
    assert "fused multiply-adds" in amd
    assert "spills" in few
    assert "stack" in few
    assert "2-byte accesses" in cuda
    assert "2-byte accesses" in gfx


def test_the_compile_check_does_not_pretend_in_the_interpreter() -> None:
    done = run("-m", "hsa.kernels.compile_check", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


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
