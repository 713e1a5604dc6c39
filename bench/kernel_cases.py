"""What bench_kernels measures: shapes, dtypes, the bytes that must move, and every way to merge, held to the oracle.

A problem is the q, k and v weights of a Whisper encoder (random; no biases), 60 % of the heads kept, in several copies,
so that no cache holds one when its turn comes again. Shape letters: `G` projections of width `d`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

# A checkout that is not installed has hsa beside this folder, and hsa.kernels in the folder kernels/.
if importlib.util.find_spec("hsa") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from cases import ALPHA, LAM, K
from kernel_shapes import F32, TRAFFIC, Mix, Shape

import hsa
from hsa import reference
from hsa.architectures.base import Partition
from hsa.architectures.whisper import WHISPER
from hsa.backends.base import Merged, TaskBuffers
from hsa.backends.cpu import CpuBackend
from hsa.backends.resident import CODE_OF, CpuResident, bytes_of
from hsa.methods.hsa import ROLES, TARGET, HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.tensors import TensorTask
from hsa.planning.tasks import Targets
from hsa.sources.tensor_places import TensorRef

if importlib.util.find_spec("hsa.kernels") is None:
    hsa.__path__.append(str(Path(__file__).resolve().parents[1]))

Tensor = torch.Tensor

TEMPORARIES = 6
"""Float32 blocks of all targets that the formula in torch holds at its widest, stacked: base widened, both task
vectors, their magnitudes and the sum."""

MOST_TEMPORARIES = 2 << 30
"""Bytes that a case may take for temporaries on a CPU."""

SETTINGS = HsaSettings(k=K, lam=LAM, alpha=ALPHA)


CASES = {
    "cuda": tuple(name for name in TRAFFIC if not name.startswith("CPU")),
    "cpu": tuple(name for name in TRAFFIC if name.startswith(("CPU", "eager"))),
}
"""What is measured on each device."""

WHOLE = ("one pass, in place", "one pass, new buffer", "two launches, in place", "CPU backend, merge")
"""The cases of ours that do all that the formula in torch does."""


@dataclass(frozen=True)
class Case:
    """One way to merge.

    `call` merges the set of that number, and returns what says which heads were selected, or None. An `exact` case is
    held to the oracle's bits, another to its values within rounding. `missing` says why there can be no figures of it.
    """

    name: str
    call: Callable[[int], object]
    exact: bool = False
    to_out: bool = False
    missing: str = ""


@dataclass
class Sources:
    """Three models' targets and a new buffer, each one block [G, d, d], and primary as it was, shared by all sets."""

    base: Tensor
    primary: Tensor
    secondary: Tensor
    out: Tensor
    kept: Tensor

    def restore(self) -> None:
        self.primary.copy_(self.kept)

    def again(self) -> Sources:
        """The same numbers in other memory."""
        return Sources(*(block.clone() for block in (self.base, self.primary, self.secondary, self.out)), self.kept)


def make(shape: Shape, mix: Mix, device: str, seed: int = 0) -> Sources:
    """Base of spread 0.02; task vectors that grow from head to head, so that no selection depends on rounding."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.count, shape.width, shape.width)
    growth = 1e-3 * (1 + torch.arange(shape.heads, device=device) / shape.heads)
    growth = growth.repeat_interleave(shape.width // shape.heads)[:, None]
    dtypes = (mix.base, mix.primary, mix.secondary, mix.out, mix.primary)
    blocks = [torch.empty(size, dtype=dtype, device=device) for dtype in dtypes]
    for g in range(shape.count):
        base = torch.randn(size[1:], generator=generator, device=device).mul_(0.02)
        blocks[0][g] = base
        for block in blocks[1:3]:
            block[g] = torch.randn(size[1:], generator=generator, device=device).mul_(growth).add_(base)
    blocks[4].copy_(blocks[1])
    return Sources(*blocks)


def formula(base: Tensor, primary: Tensor, secondary: Tensor, c1: Tensor, keep: int, heads: int) -> Tensor:
    """Weights [G, d, d], merged in plain torch with c1 [G, 1, 1]: scores, selection, result in primary's dtype."""
    wide = base.float()
    tv1, tv2 = primary.float() - wide, secondary.float() - wide
    squared = (tv1.abs() + tv2.abs()).square().view(len(base), heads, -1).sum(dim=2)
    cut = squared.topk(keep, dim=1).values[:, -1:]
    chosen = (squared >= cut).repeat_interleave(base.shape[1] // heads, dim=1)[:, :, None]
    return torch.where(chosen, (wide + (c1 * tv1 + (1 - c1) * tv2)).to(primary.dtype), primary)


def matches(found: Tensor, wanted: Tensor, exact: bool) -> bool:
    """Whether two tensors of one dtype hold the same bits, or else the same values up to a rounding or two.

    Heads that were selected otherwise differ by far more somewhere.
    """
    if exact:
        bits = torch.int32 if wanted.dtype == F32 else torch.int16
        return torch.equal(found.view(bits), wanted.view(bits))
    return torch.allclose(found, wanted, rtol=2 * torch.finfo(wanted.dtype).eps, atol=1e-7)


def chosen_heads(returned: object) -> list[tuple[int, ...]] | None:
    """The selected heads of every projection, from what a case's call returned; None where it says nothing."""
    if isinstance(returned, Tensor):
        return [tuple(row.nonzero().flatten().tolist()) for row in returned.cpu()]
    if isinstance(returned, list):
        return [merged.decision.selected for merged in returned]
    return None


class Problem(ABC):
    """Every way to merge one shape in one mix on a device, over `sets` copies of the same sources.

    `share` is that of the selected heads, known once `admitted` has asked the oracle.
    """

    share: float

    def __init__(self, shape: Shape, mix: Mix, device: str, sets: int) -> None:
        self.shape, self.mix = shape, mix
        self.keep = reference.keep_count(K, shape.heads)
        self.c1 = torch.tensor(shape.coefficients, dtype=F32, device=device)
        first = make(shape, mix, device)
        self.sets = [first, *(first.again() for _ in range(sets - 1))]

    @abstractmethod
    def ours(self) -> list[Case]:
        """The ways of this package."""

    def others(self) -> list[Case]:
        """The same formula in torch."""
        return self._ways("eager torch", formula)

    def room(self) -> int:
        """Bytes that a case may take for temporaries."""
        return MOST_TEMPORARIES

    def check(self, case: Case, i: int) -> None:  # noqa: B027 - most have nothing to say
        """Raise where the last call of a case of ours met NaN or Inf and has not raised yet."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what waits in the background."""

    def admitted(self) -> Iterator[Case]:
        """The correctness gate: every case once its result was found to be the oracle's, or its `missing` says why not.

        Raises SystemExit for another result than the oracle's.
        """
        values, selected = self._oracle()
        self.share = sum(map(len, selected)) / (self.shape.count * self.shape.heads)
        for case in (*self.ours(), *self.others()):
            yield case if case.missing else self._held(case, values, selected)

    def _oracle(self) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Values [G, d, d], and the selected heads of every projection."""
        of, shape = self.sets[0], self.shape
        values, selected = torch.empty_like(of.out), []
        for g in range(shape.count):
            merged = reference.merge_tensor(
                of.base[g].cpu(), of.kept[g].cpu(), of.secondary[g].cpu(),
                k=K, lam=LAM, alpha=ALPHA, layer=g // 3, layers=shape.layers, heads=shape.heads,
            )  # fmt: skip
            values[g] = merged.value
            selected.append(merged.selected)
        return values, selected

    def _held(self, case: Case, values: Tensor, selected: list[tuple[int, ...]]) -> Case:
        """The case, compared with the oracle: in every set where each has tables of its own."""
        for i, of in enumerate(self.sets if case.exact else self.sets[:1]):
            of.restore()
            of.out.fill_(torch.nan)
            try:
                found = chosen_heads(case.call(i))
            except Exception as error:  # torch.compile fails in many ways, none of which concerns ours
                if case.exact:
                    raise
                return replace(case, missing=f"{type(error).__name__}: {error}".split("\n")[0])
            if case.exact:
                self.check(case, i)
            result = of.out if case.to_out else of.primary
            for g in range(self.shape.count):
                if found is not None and found[g] != selected[g]:
                    raise SystemExit(
                        f"correctness gate: {case.name} selects other heads of projection {g} than the oracle"
                    )
                if not matches(result[g], values[g], case.exact):
                    raise SystemExit(f"correctness gate: {case.name} differs from the oracle in projection {g}")
            of.restore()
        return case

    def _ways(self, way: str, merge: Callable[..., Tensor]) -> list[Case]:
        needed, room = TEMPORARIES * 4 * self.shape.elements, self.room()
        fits = needed <= room
        missing = "" if fits else f"its temporaries take {needed / 1e9:.1f} GB, of {room / 1e9:.1f} GB that it may"
        return [
            Case(f"{way}, tensor by tensor", partial(self._each, merge)),
            Case(f"{way}, stacked", partial(self._stacked, merge), missing=missing),
        ]

    def _each(self, merge: Callable[..., Tensor], i: int) -> None:
        of, heads = self.sets[i], self.shape.heads
        for g in range(self.shape.count):
            one = slice(g, g + 1)
            c1 = self.c1[one, None, None]
            of.primary[one].copy_(merge(of.base[one], of.primary[one], of.secondary[one], c1, self.keep, heads))

    def _stacked(self, merge: Callable[..., Tensor], i: int) -> None:
        of, c1 = self.sets[i], self.c1[:, None, None]
        of.primary.copy_(merge(of.base, of.primary, of.secondary, c1, self.keep, self.shape.heads))


class GpuProblem(Problem):
    """The kernels against torch, eager and compiled; on the device "cpu" in Triton's interpreter."""

    def __init__(self, shape: Shape, mix: Mix, sets: int, device: str = "cuda") -> None:
        from hsa.kernels import launch
        from hsa.kernels.projections import Projections

        super().__init__(shape, mix, device, sets)
        self.launch = launch
        self.c2 = torch.tensor([1.0 - c for c in shape.coefficients], dtype=F32, device=device)
        self.keeps = torch.full((shape.count,), self.keep, dtype=torch.int32, device=device)

        def plan(of: Sources, out: Tensor) -> Projections:
            roles = (of.base, of.primary, of.secondary, out)
            return Projections(*(list(role) for role in roles), heads=shape.heads)

        self.in_place = [plan(of, of.primary) for of in self.sets]
        self.to_new = [plan(of, of.out) for of in self.sets]
        self.scores = [launch.score_heads(held).clone() for held in self.in_place]

    def ours(self) -> list[Case]:
        names, calls = CASES["cuda"][:4], (self._fused, self._fused_new, self._two, self._apply)
        return [
            Case(name, call, exact=True, to_out=name == "one pass, new buffer")
            for name, call in zip(names, calls, strict=True)
        ]

    def others(self) -> list[Case]:
        torch.compiler.reset()
        return [*super().others(), *self._ways("torch.compile", torch.compile(formula, dynamic=False))]

    def room(self) -> int:
        if not torch.cuda.is_available():
            return super().room()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def check(self, case: Case, i: int) -> None:
        self.launch.check((self.to_new if case.to_out else self.in_place)[i])

    def _fused(self, i: int) -> Tensor:
        return self.launch.fused_merge(self.in_place[i], self.keeps, self.c1, self.c2)[1]

    def _fused_new(self, i: int) -> Tensor:
        return self.launch.fused_merge(self.to_new[i], self.keeps, self.c1, self.c2)[1]

    def _two(self, i: int) -> Tensor:
        scores = self.launch.score_heads(self.in_place[i])
        return self.launch.apply_heads(self.in_place[i], scores, self.keeps, self.c1, self.c2)

    def _apply(self, i: int) -> Tensor:
        return self.launch.apply_heads(self.in_place[i], self.scores[i], self.keeps, self.c1, self.c2)


class CpuProblem(Problem):
    """The CPU backend with `threads` threads, against eager torch."""

    def __init__(self, shape: Shape, mix: Mix, sets: int, threads: int) -> None:
        super().__init__(shape, mix, "cpu", sets)
        self._tasks = tuple(self._task(g) for g in range(shape.count))
        self._jobs = [[self._job(of, g) for g in range(shape.count)] for of in self.sets]
        self._residents = [self._resident(jobs, threads) for jobs in self._jobs]
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, initializer=_begin, initargs=(self._own,))

    def close(self) -> None:
        self._pool.shutdown()

    def ours(self) -> list[Case]:
        merge, apply = CASES["cpu"][:2]
        return [Case(merge, self._merge, exact=True), Case(apply, self._apply, exact=True, to_out=True)]

    def _task(self, g: int) -> TensorTask:
        shape, mix = self.shape, self.mix
        name = f"encoder.layers.{g // 3}.self_attn.{'qkv'[g % 3]}_proj.weight"
        size, dtypes = (shape.width, shape.width), (mix.base, mix.primary, mix.secondary)
        refs = [TensorRef(name, CODE_OF[d], size, 0, 0, math.prod(size) * d.itemsize) for d in dtypes]
        return TensorTask(
            name=name,
            place=WHISPER.place(name),
            layers=shape.layers,
            shape=size,
            partition=Partition(0, shape.heads),
            sources=dict(zip(ROLES, refs, strict=True)),
            anchor="primary",
            out_code=CODE_OF[mix.out],
            output_name=name,
            passes=TARGET.passes,
            layout="heads",
        )

    def _job(self, of: Sources, g: int) -> TaskBuffers:
        sources = {role: bytes_of(getattr(of, role)[g]) for role in ROLES}
        return TaskBuffers(self._tasks[g], sources, out=sources["primary"])

    def _resident(self, jobs: list[TaskBuffers], threads: int) -> CpuResident:
        data = {role: {job.task.name: job.sources[role] for job in jobs} for role in ROLES}
        resident = CpuResident(Targets(method_named(SETTINGS.method), SETTINGS, self._tasks), data, threads)
        resident.measure()
        return resident

    def _merge(self, i: int) -> list[Merged]:
        """Target by target, each thread with a worker of its own, as the pipeline does."""
        return list(self._pool.map(lambda job: self._own.worker.merge_all([job])[0], self._jobs[i]))

    def _apply(self, i: int) -> None:
        self._residents[i].write(SETTINGS, list(self.sets[i].out))


def _begin(own: threading.local) -> None:
    """Give a thread its worker."""
    own.worker = CpuBackend().worker(method_named(SETTINGS.method), SETTINGS)
