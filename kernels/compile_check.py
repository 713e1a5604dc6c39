"""Compile every kernel ahead of time for every target, and refuse code that spills or reads element by element.

    python -m hsa.kernels.compile_check [--workers N]

needs no GPU. Each kernel is compiled in the ten dtype mixes of `MIXES`, as `launch` would compile it, for CUDA 8.0,
9.0, 10.0 and AMD gfx942. A kernel is refused for spilled registers, stack or scratch memory, fused multiply-adds,
flushed subnormals, and, if addresses are aligned, 2-byte global loads or stores of one element. The table gives
registers per thread and bytes of shared memory per program. The exit code is 1 if any kernel is refused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from hsa.kernels import fused, headwise, tuning
from hsa.kernels.projections import LEAST_PADDED_HEADS, Variant, interpreted
from hsa.kernels.tuning import Tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

MIXES = {
    "float32": Variant((F32, F32, F32, F32), in_place=True, aligned=True),
    "float16": Variant((F16, F16, F16, F16), in_place=True, aligned=True),
    "bfloat16": Variant((BF16, BF16, BF16, BF16), in_place=True, aligned=True),
    "float16-base": Variant((F16, F32, F32, F32), in_place=True, aligned=True),
    "float16-tunes": Variant((F32, F16, F16, F16), in_place=True, aligned=True),
    "bfloat16-tunes": Variant((F32, BF16, BF16, BF16), in_place=True, aligned=True),
    "float32-secondary": Variant((F16, F16, F32, F16), in_place=True, aligned=True),
    "to-float16": Variant((F16, F32, F32, F16), in_place=False, aligned=True),
    "to-bfloat16": Variant((F32, F32, F32, BF16), in_place=False, aligned=True),
    "to-float32": Variant((F16, F16, F16, F32), in_place=False, aligned=True),
}
"""Dtypes of base, primary, secondary and out. Large models are published in float16 and tuned in float32 or
bfloat16; `to-*` are casts by --dtype into a new buffer."""

NEW_BUFFER = ("float32", "float16", "bfloat16")
"""Mixes that are also compiled for a new buffer, into which unselected heads are copied."""

SCALED = ("float32", "float16", "bfloat16")
UNALIGNED = ("float32", "float16", "float16-base")
COLUMNS = ("float32", "float16")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

DEVICES = {"sm_90": ("NVIDIA H200",)}
"""Devices of a target that have a tuning of their own."""

KERNELS = {
    "fused": fused.fused_kernel,
    "score": headwise.score_kernel,
    "apply": headwise.apply_kernel,
}

POINTERS = {
    "*i64": ("base", "primary", "secondary", "out", "geometry", "slots", "released"),
    "*i32": ("items", "members", "status", "arrivals", "states", "tickets", "keep"),
    "*fp64": ("scores",),
    "*u8": ("selected",),
    "*fp32": ("c1", "c2"),
}
NUMBERS = {"work": "i32", "projections": "i32", "deciders": "i32", "patience": "i32", "scale": "fp32"}
SIGNATURE = {name: kind for kind, names in POINTERS.items() for name in names} | NUMBERS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """One kernel to compile, by the names of `KERNELS`, `MIXES`, `TARGETS` and `DEVICES`."""

    kernel: str
    mix: str
    target: str
    in_place: bool
    aligned: bool
    scaled: bool
    one_run: bool
    device: str

    @property
    def variant(self) -> Variant:
        return replace(MIXES[self.mix], in_place=self.in_place, aligned=self.aligned)

    @property
    def tuning(self) -> Tuning:
        sizes = [dtype.itemsize for dtype in self.variant.dtypes]
        return tuning.choose(sizes, self.aligned, self.one_run, self.device)

    def __str__(self) -> str:
        kinds = ["in place" if self.in_place else "new buffer"] if self.kernel != "score" else []
        kinds += [] if self.aligned else ["unaligned"]
        kinds += [] if self.one_run or not self.aligned else ["columns"]
        kinds += ["scaled"] if self.scaled else []
        target = f"{self.target} {self.device.removeprefix('NVIDIA ')}"
        return f"{target:11} {self.kernel:6} {self.mix:18} {', '.join(kinds):29}"


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs (registers per thread; bytes of shared memory), and why it is refused."""

    case: Case
    rows: int
    warps: int
    registers: int
    shared: int
    refusals: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "; ".join(self.refusals) or "ok"
        return f"{self.case} {self.rows:4} x {self.warps} {self.registers:9} {self.shared:6}  {verdict}"


HEADING = f"{'target':11} {'kernel':6} {'mix':18} {'variant':29} rows x warps registers shared"


def cases() -> Iterator[Case]:
    """Everything to compile: each target in general, and cases with a tuning of their own for a measured device."""
    for target in TARGETS:
        for case in _cases(target):
            yield case
            for device in DEVICES.get(target, ()):
                tuned = replace(case, device=device)
                if tuned.tuning != case.tuning:
                    yield tuned


def _cases(target: str) -> Iterator[Case]:
    for mix, variant in MIXES.items():
        for kernel in KERNELS:
            plain = Case(kernel, mix, target, variant.in_place, aligned=True, scaled=False, one_run=True, device="")
            yield plain
            if kernel != "score" and mix in SCALED:
                yield replace(plain, scaled=True)
            if kernel != "score" and mix in NEW_BUFFER:
                yield replace(plain, in_place=False)
            if mix in UNALIGNED:
                yield replace(plain, aligned=False, one_run=False)
            if mix in COLUMNS and kernel != "score":
                yield replace(plain, one_run=False)


def compile_case(case: Case, **changed: object) -> Compiled:
    """Compile one case and judge the code. `changed` are compiler options that differ from a launch's."""
    kernel = KERNELS[case.kernel]
    variant = case.variant
    tuned = case.tuning
    target = TARGETS[case.target]
    fused, amd = case.kernel == "fused", target.backend == "hip"
    constants = {
        **variant.constants(),
        "P": LEAST_PADDED_HEADS,
        "ROWS": tuned.rows,
        "ONE_RUN": case.one_run and not amd,
        "SCALED": case.scaled,
        "HELD": tuned.held,
        "ALONE": False,
    }
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: SIGNATURE.get(name, "constexpr") for name in names},
        {name: constants[name] for name in names if name not in SIGNATURE},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if SIGNATURE.get(name, "").startswith("*")},
    )
    registers = tuned.fused_registers if fused else tuned.registers
    options = {**tuning.compiler_options(tuned, registers, amd=amd), **changed}
    compiled = triton.compile(source, target=target, options=options)
    judge = _judge_cuda if target.backend == "cuda" else _judge_amd
    used, refusals = judge(compiled.asm, case.aligned)
    return Compiled(case, tuned.rows, tuned.warps, used, compiled.metadata.shared, tuple(refusals))


def _judge_cuda(asm: dict[str, object], aligned: bool) -> tuple[int, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        cubin = asm["cubin"]
        assert isinstance(cubin, bytes)
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    ptx = str(asm["ptx"])
    registers, stack, local = (_number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    refusals = [f"{n} bytes of {name}" for name, n in (("stack", stack), ("local memory", local)) if n]
    refusals += _counted("spills", r"\b(?:LDL|STL)\b", sass)
    refusals += _counted("fused multiply-adds", r"\bFFMA2?\b|\bDFMA\b|\bHFMA2\S*\b(?!.*-RZ)", sass)
    refusals += _counted("flushes of subnormals", r"\.ftz\b", ptx)
    if aligned:
        refusals += _counted("2-byte accesses", r"\b(?:ld|st)\.(?:global|volatile)(?!\S*\.v\d)\S*\.[busf]16\b", ptx)
        refusals += _none("16-byte loads", r"\bld\.global\S*\.v4\.[busf]32\b", ptx)
    return registers, refusals


def _judge_amd(asm: dict[str, object], aligned: bool) -> tuple[int, list[str]]:
    code = str(asm["amdgcn"])
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    refusals = [f"{n} of {name}" for name in names if (n := _number(rf"\.{name}:\s*(\d+)", code))]
    refusals += _counted(
        "fused multiply-adds", r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)(?:_mix\w*|ak|mk)?_f(?:16|32|64)\b", code
    )
    if aligned:
        refusals += _counted("2-byte accesses", r"\b(?:global|buffer|flat)_(?:load|store)_(?:[us]?short|b16)\w*", code)
        refusals += _none("16-byte loads", r"\bglobal_load_dwordx4\b", code)
    return _number(r"\.vgpr_count:\s*(\d+)", code), refusals


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern}: its format has changed")
    return int(found[1])


def _counted(what: str, pattern: str, text: str) -> list[str]:
    count = len(re.findall(pattern, text))
    return [f"{count} {what}"] if count else []


def _none(what: str, pattern: str, text: str) -> list[str]:
    return [] if re.search(pattern, text) else [f"no {what}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hsa.kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default 2)")
    workers = parser.parse_args().workers
    if interpreted():
        print("compile_check: TRITON_INTERPRET is set, so there is nothing to compile; unset it", file=sys.stderr)
        return 2
    every = list(cases())
    print(HEADING)
    refused = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, every):
            print(found, flush=True)
            refused += bool(found.refusals)
    print(f"{len(every)} kernels compiled with Triton {triton.__version__}, {refused} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
