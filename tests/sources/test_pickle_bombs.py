"""Pickles that are small and cost much, through the command line: they cost little more than sound ones.

Each is of tests/corpus, which tests/fuzz/test_corpus.py replays whole; tests/fuzz/bombs.py says what each does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import merge_arguments, read_tensors, with_description, write_adapter, write_openai, write_pickle

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
Triple = dict[str, Path]


def merge_in_a_process(triple: Triple, output: Path, timeout: float) -> tuple[float, int, str]:
    """CPU seconds, bytes of memory at the peak, and the last line of `hsa merge`."""
    arguments = [str(Path(sys.executable).parent / "hsa"), *merge_arguments(triple, output, "--no-sync", "--quiet")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        stop = time.monotonic() + timeout
        while True:
            ended, status, used = os.wait4(running.pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > stop:
                running.kill()
                pytest.fail(f"it takes more than {timeout} s")
            time.sleep(0.02)
        running.returncode = os.waitstatus_to_exitcode(status)
        lines = running.stdout.read().splitlines()
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, lines[-1] if lines else ""


@pytest.mark.parametrize("bomb", ["shared-tuples-as-a-dimension", "shared-tuples-as-the-name-of-a-tensor"])
def test_a_bomb_in_a_file_of_openais_costs_no_more_than_a_sound_file(triple: Triple, tmp_path: Path, bomb: str) -> None:
    """188 bytes of shared nested tuples took 22 s and 826 MB, or minutes in which no signal was heard."""
    given = {**triple, "secondary": write_openai(tmp_path / "secondary.pt", triple["secondary"])}
    sound = merge_in_a_process(given, tmp_path / "sound", 60)
    archive = (tmp_path / "secondary.pt").read_bytes()
    (tmp_path / "secondary.pt").write_bytes(with_description(archive, (CORPUS / "openai" / bomb).read_bytes()))
    cpu, memory, said = merge_in_a_process(given, tmp_path / "out", 30)
    assert said.startswith("hsa: error: secondary: ") and len(said) < 1000
    assert cpu < sound[0] + 2
    assert memory < sound[1] + (512 << 20)


@pytest.mark.parametrize("bomb", ["shared-tuples-as-a-key", "many-bytearrays", "a-bytearray-of-2-gib"])
def test_a_bomb_in_a_state_dict_costs_no_more_than_a_sound_one(triple: Triple, tmp_path: Path, bomb: str) -> None:
    write_pickle(triple["secondary"], read_tensors(triple["secondary"]))
    sound = merge_in_a_process(triple, tmp_path / "sound", 60)
    file = triple["secondary"] / "pytorch_model.bin"
    file.write_bytes(with_description(file.read_bytes(), (CORPUS / "pickle" / bomb).read_bytes()))
    cpu, memory, said = merge_in_a_process(triple, tmp_path / "out", 30)
    assert said.startswith("hsa: error: secondary: ") and len(said) < 1000
    assert cpu < sound[0] + 2
    assert memory < sound[1] + (512 << 20)


def test_a_bomb_in_an_adapter_costs_no_more_than_a_sound_one(triple: Triple, tmp_path: Path) -> None:
    weights = {k: v for k, v in read_tensors(triple["base"]).items() if k.endswith("self_attn.q_proj.weight")}
    adapter = tmp_path / "adapter"
    file = adapter / "adapter_model.bin"
    torch.save(write_adapter(adapter, weights), file)
    (adapter / "adapter_model.safetensors").unlink()
    given = {**triple, "secondary": adapter}
    sound = merge_in_a_process(given, tmp_path / "sound", 60)
    file.write_bytes(with_description(file.read_bytes(), (CORPUS / "pickle" / "shared-tuples-as-a-key").read_bytes()))
    cpu, memory, said = merge_in_a_process(given, tmp_path / "out", 30)
    assert said.startswith("hsa: error: secondary: ") and len(said) < 1000
    assert cpu < sound[0] + 2
    assert memory < sound[1] + (512 << 20)
