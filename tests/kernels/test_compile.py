"""Every kernel compiled ahead of time, in processes of their own; a file apart runs beside the interpreted ones."""

from __future__ import annotations

import pytest
from processes import run
from sampling import EVERYTHING

pytestmark = pytest.mark.long

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = ("fused", "score", "apply")

SAMPLE = """
import sys
from dataclasses import replace
from hsa.kernels import compile_check

alike = {}
for case in compile_check.cases():
    alike.setdefault(replace(case, target="", device=""), []).append(case)
covered, sample = set(), []
for case, targets in alike.items():
    new = {(case.kernel, case.mix), replace(case, mix="")} - covered
    if new:
        turn = sum(each.kernel == case.kernel for each in sample)
        sample.append(targets[-1 - turn % len(targets)])
        covered |= new
compile_check.cases = lambda: sample
sys.exit(compile_check.main())
"""
"""Each kernel in each mix, and in each variant in some mix, for one of its targets in turn."""


def compiled(*arguments: str) -> list[list[str]]:
    """The rows that the compile check prints, in words."""
    done = run(*arguments)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(not EVERYTHING, reason="make test-all and make compile-check compile everything")
def test_every_kernel_compiles_for_every_target() -> None:
    rows = compiled("-m", "hsa.kernels.compile_check")
    for target in TARGETS:
        for kernel in KERNELS:
            mixes = {row[2] for row in rows if row[:2] == [target, kernel] and row[-1] == "ok"}
            assert len(mixes) == 10, (target, kernel, mixes)
    tuned = [row for row in rows if row[1:3] == ["H200", "fused"]]
    assert {row[3] for row in tuned} >= {"float32", "float16", "bfloat16"}


@pytest.mark.skipif(EVERYTHING, reason="all cases are compiled, of which this is a sample")
def test_every_kernel_compiles_in_every_variant() -> None:
    rows = [row for row in compiled("-c", SAMPLE) if row[-1] == "ok"]
    for row in rows:
        if row[1] == "H200":
            row[:2] = ["H200"]
    for kernel in KERNELS:
        assert len({row[2] for row in rows if row[1] == kernel}) == 10
        assert {row[0] for row in rows if row[1] == kernel} == {*TARGETS, "H200"}


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
