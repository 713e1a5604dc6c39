"""What only a GPU can show: programs that run at once, real compilers, streams, memory, and the sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu import NO_GPU, ROOT

if NO_GPU:
    pytest.skip(NO_GPU, allow_module_level=True)

from hsa.kernels import fused, tuning
from hsa.kernels.launch import apply_heads, check, fused_merge, score_heads
from kernel_problems import (
    LAYER,
    Parameters,
    Problem,
    assert_equal,
    assert_merges,
    expected,
    make,
    same_bits,
)

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
TYPES = ["float32", "float16", "bfloat16"]
SHAPES_OF_LAYERS = [(640, 640), (640,), (640, 640), (640, 640), (640,)] * 6
"""Six layers of q, k and v: more work than a GPU holds at once."""

TUNINGS = {name: entry for name, entry in vars(tuning).items() if isinstance(entry, tuning.Tuning)}
TUNINGS |= {f"{part}-{size}": entry for part, by_size in tuning.BY_DEVICE.items() for size, entry in by_size.items()}


@pytest.mark.parametrize("entry", TUNINGS)
@pytest.mark.parametrize("mix", [*TYPES, "float16-base", "float16-new"])
def test_every_tuning_gives_the_bytes_of_the_oracle(entry: str, mix: str) -> None:
    """With as many programs as are started by default, and on storage that is not aligned too."""
    problem = make([(640, 640), (640,), (640, 640)], 10, mix, [0, 0, 1])
    assert_merges(problem, programs=None, tuned=TUNINGS[entry])
    if entry == "UNALIGNED":
        for role in (problem.base, problem.primary, problem.secondary):
            role[:] = [_misaligned(tensor) for tensor in role]
        wanted = expected(problem, Parameters())
        plan = problem.plan()
        assert [group.variant.aligned for group in plan.groups] == [False]
        scores, selected = fused_merge(plan, Parameters().keep(10), *Parameters().weights)
        assert_equal(problem, scores, selected, wanted)


def _misaligned(tensor: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("mix", ["float32", "float16-new", "bfloat16"])
def test_repeated_launches_give_identical_bytes(mix: str) -> None:
    """In place, primary is put back before each launch; a new buffer is poisoned."""
    kept = make(SHAPES_OF_LAYERS, 10, mix)
    wanted = expected(kept, Parameters())
    problem = kept.fresh()
    plan = problem.plan()
    poisoned = kept.primary if kept.out is None else kept.out
    first: tuple[torch.Tensor, list[torch.Tensor]] | None = None
    written_from_registers = 0
    for repetition in range(200):
        for tensor, before in zip(problem.results, poisoned, strict=True):
            tensor.copy_(before)
        scores, selected = fused_merge(plan, Parameters().keep(10), *Parameters().weights)
        written_from_registers += int((plan.workspace().states == fused.DONE.value).any())
        if first is None:
            assert_equal(problem, scores, selected, wanted)
            first = scores.clone(), [tensor.clone() for tensor in problem.results]
        assert torch.equal(scores, first[0]), f"scores of launch {repetition}"
        bits = torch.int32 if mix == "float32" else torch.int16
        same = [torch.equal(a.view(bits), b.view(bits)) for a, b in zip(problem.results, first[1], strict=True)]
        assert all(same), f"launch {repetition}, projection {same.index(False)}"
    check(plan)
    assert written_from_registers


@pytest.mark.parametrize("mix", ["float32-new", "float16-new"])
def test_streams_do_not_disturb_each_other(mix: str) -> None:
    """Four streams at once, each with parameters and outputs of its own; base and secondary are shared."""
    whole = make(SHAPES_OF_LAYERS, 10, mix)
    grid = [Parameters(k=k, lam=lam) for k, lam in ((0.6, 0.5), (0.3, 0.9), (1.0, 0.1), (0.0, 0.5))]
    wanted = [expected(whole, parameters) for parameters in grid]
    problems = [
        Problem(whole.base, whole.primary, whole.secondary, whole.fresh().out, whole.heads, whole.axes) for _ in grid
    ]
    plans = [problem.plan() for problem in problems]
    streams = [torch.cuda.Stream() for _ in grid]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, plan, parameters in zip(streams, plans, grid, strict=True):
            with torch.cuda.stream(stream):
                found = fused_merge(plan, parameters.keep(10), *parameters.weights)
                del found
    torch.cuda.synchronize()
    for stream, plan, problem, parameters, want in zip(streams, plans, problems, grid, wanted, strict=True):
        with torch.cuda.stream(stream):
            space = plan.workspace()
            assert_equal(problem, space.scores, space.selected.view(torch.bool), want)
            check(plan)
            assert sum(map(len, (one.selected for one in want))) == parameters.keep(10) * len(want)


def test_streams_share_a_plan_that_writes_nothing() -> None:
    """Every stream has a workspace of its own."""
    plan = make(SHAPES_OF_LAYERS, 10, "float16").plan()
    alone = score_heads(plan).clone()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(score_heads(plan))
    torch.cuda.synchronize()
    assert len({scores.data_ptr() for scores in found}) == len(streams)
    assert all(torch.equal(scores, alone) for scores in found)
    assert alone.any()


def test_launches_allocate_nothing_after_the_first() -> None:
    problem = make(LAYER, 2, "float16-new", [0, 0, 1])
    plan = problem.plan()

    def round_of(keep: int, c1: float) -> None:
        fused_merge(plan, keep, c1, 1 - c1)
        apply_heads(plan, score_heads(plan), keep, c1, 1 - c1)
        check(plan)

    round_of(1, 0.5)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for keep in (0, 1, 2):
        round_of(keep, keep / 4)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.fixture(scope="module", params=TYPES)
def typed_triple(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp(request.param), SHAPES["test"], dtype=request.param)


@pytest.mark.skipif(find_spec("blake3") is None, reason="hsa.merge needs blake3")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"targets": "attention-all", "attention_scale": 0.5}])
def test_merge_writes_the_bytes_of_the_cpu(typed_triple: Triple, tmp_path: Path, options: dict[str, object]) -> None:
    files = {}
    for backend in ("cpu", "triton"):
        report = hsa.merge(output=tmp_path / backend, backend=backend, **typed_triple, **options)  # type: ignore[arg-type]
        assert report.backend == backend
        files[backend] = (tmp_path / backend / "model.safetensors").read_bytes()
    assert files["triton"] == files["cpu"]
    assert files["cpu"] != (typed_triple["primary"] / "model.safetensors").read_bytes()


def test_merger_applies_on_the_gpu_without_allocating(typed_triple: Triple) -> None:
    from transformers import WhisperForConditionalGeneration

    def load() -> WhisperForConditionalGeneration:
        return WhisperForConditionalGeneration.from_pretrained(typed_triple["primary"], local_files_only=True)

    cpu_model, gpu_model = load(), load().to("cuda")
    cpu = hsa.Merger(**typed_triple, backend="cpu", device="cpu")
    gpu = hsa.Merger(**typed_triple, device="cuda")
    assert (gpu.backend, torch.device(gpu.device).type) == ("triton", "cuda")
    for name, score in cpu.scores.items():
        torch.testing.assert_close(gpu.scores[name], score, rtol=1e-6, atol=0)
    gpu.apply_(gpu_model)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    merged = []
    for k, lam, alpha in ((0.6, 0.5, 0.2), (0.0, 0.5, 0.2), (1.0, 0.0, 0.7), (0.3, 0.9, 0.0), (0.6, 0.5, 0.2)):
        assert gpu.apply_(gpu_model, k=k, lam=lam, alpha=alpha) is gpu_model
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert after == before, f"{after - before} allocations"
        cpu.apply_(cpu_model, k=k, lam=lam, alpha=alpha)
        found = gpu_model.state_dict()
        differ = [name for name, tensor in cpu_model.state_dict().items() if not same_bits(found[name], tensor)]
        assert differ == []
        merged.append(found["model.encoder.layers.0.self_attn.v_proj.weight"].cpu())
    assert same_bits(merged[0], merged[-1])
    assert not same_bits(merged[0], merged[1])


SMALL_LAUNCH = """
from kernel_problems import LAYER, Parameters, assert_merges, make

assert_merges(make(LAYER, 2, "float16", [0, 0, 1]), Parameters(k=0.5), programs=8)
print("merged")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine")
    # Without torch's pool an access beyond a tensor leaves its allocation, where memcheck sees it.
    places = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_LAUNCH],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": places},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "merged" in done.stdout
