"""Options that no merge takes: out of range, no number, not for this numerics, or not there at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bad_input import Refuse, Triple
from helpers import (
    merge_arguments,
    read_tensors,
    write_tensors,
)

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")


# Parameters --------------------------------------------------------------------------------------------------

NOT_FINITE = ("nan", "inf", "-inf")
RANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "k": (("-0.1", "100.5", "1e308", *NOT_FINITE), "in [0, 100]"),
    "lambda": (("-0.1", "1.1", "60", *NOT_FINITE), "in [0, 1]"),
    "alpha": (("-0.1", *NOT_FINITE), "finite and at least 0"),
    "attention-scale": (NOT_FINITE, "finite"),
    "non-attention-scale": (NOT_FINITE, "finite"),
    "num-heads": (("0", "-4", "10001"), "a whole number from 1 to 10000"),
    "num-layers": (("0", "-1", "10001"), "a whole number from 1 to 10000"),
    "threads": (("0", "-1", "257"), "a whole number from 1 to 256"),
    "dtype": (("float64", "fp16", "", "FLOAT16"), "one of auto, float32, float16, bfloat16"),
    "targets": (("qkv", "", "encoder-qkv,attention-all"), "one of encoder-qkv, attention-qkv, attention-all"),
    "numerics": (("fast", ""), "one of exact, reference"),
    "assets-from": (("nobody", ""), "one of base, primary, secondary"),
    "max-shard-size": (("0GB", "-1GB", "huge", "", "5XB", "nan", "1e9"), "a size such as 5GB"),
    "base-id": (("", " ", "/srv/models/base", "a\nb", "@main"), "a hub id such as org/name"),
    "primary-id": (("", "/srv/models/primary", "@main"), "a hub id such as org/name"),
    "secondary-id": (("", "/srv/models/secondary", "@main"), "a hub id such as org/name"),
    "backend": (("gpu", ""), "one of auto, cpu, triton"),
    "device": (("tpu", "", "cuda:", "cuda:-1", "cuda:x"), "auto, cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize(("option", "value"), [(o, value) for o, (values, _) in RANGES.items() for value in values])
def test_value_out_of_range(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    message = refuse(merge_arguments(triple, output, f"--{option}={value}"), RANGES[option][1], ", got ")
    assert re.search(rf"\b{option}\b", message.replace("_", "-"))


@pytest.mark.parametrize("option", ["k", "lambda", "alpha", "attention-scale", "non-attention-scale"])
@pytest.mark.parametrize("value", ["half", "", "0,5", "1e"])
def test_value_that_is_no_number(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    refuse(
        merge_arguments(triple, output, f"--{option}={value}"),
        f"--{option} must be a number, got",
        ". See: hsa merge --help",
    )


@pytest.mark.parametrize("option", ["num-heads", "num-layers", "threads"])
@pytest.mark.parametrize("value", ["four", "4.5", "", "nan"])
def test_value_that_is_no_whole_number(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    refuse(
        merge_arguments(triple, output, f"--{option}={value}"),
        f"--{option} must be a whole number, got",
        ". See: hsa merge --help",
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("licence=mit", "card field 'licence' is unknown; there are title, language, license"),
        ("license", "--card takes FIELD=VALUE, got 'license'"),
        ("=x", "card field '' is unknown"),
        ("", "--card takes FIELD=VALUE, got ''"),
    ],
)
def test_card_fields(triple: Triple, output: Path, refuse: Refuse, field: str, expected: str) -> None:
    refuse(merge_arguments(triple, output, "--card=title=T", f"--card={field}"), expected)


def test_load_dtype_without_reference_numerics(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse(merge_arguments(triple, output, "--load-dtype=float32"), "--load-dtype says", "--numerics reference")


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-all"])
def test_a_layer_missing_from_all_three(triple: Triple, output: Path, refuse: Refuse, preset: str) -> None:
    """Half a model three times over agrees with itself, and is still no model."""
    for path in triple.values():
        tensors = read_tensors(path)
        write_tensors(path, {name: t for name, t in tensors.items() if "encoder.layers.1." not in name})
    refuse(
        merge_arguments(triple, output, f"--targets={preset}"),
        "target tensor encoder.layers.1.self_attn.q_proj.weight is missing from base, primary and secondary",
        "config.json of primary promises it",
    )


def test_options_of_reference_numerics(triple: Triple, output: Path, refuse: Refuse) -> None:
    reference = merge_arguments(triple, output, "--numerics=reference")
    refuse([*reference, "--load-dtype=float16"], "--load-dtype must be one of auto, float32, got 'float16'")
    refuse([*reference, "--dtype=float16"], "numerics 'reference' writes base's dtype", "got 'float16'")
    refuse([*reference, "--backend=triton"], "numerics 'reference'", "on the CPU", "--backend cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and may have what is asked for")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--backend=triton"], "backend 'triton'"),
        (["--backend=triton", "--device=cpu"], "'triton'"),
        (["--backend=triton", "--device=cuda"], "'triton'"),
        (["--device=cuda"], "device 'cuda'"),
        (["--device=cuda:1"], "device 'cuda:1'"),
        (["--backend=cpu", "--device=cuda"], "device 'cuda'"),
    ],
)
def test_a_backend_that_cannot_be_had(
    triple: Triple, output: Path, refuse: Refuse, options: list[str], expected: str
) -> None:
    refuse(merge_arguments(triple, output, *options), expected, "; use --")


# One line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge"], "Missing option '--output'"),
        (["merge", "--base"], "--base"),
        (["merge", "--nonsense"], "--nonsense"),
        (["merge", "--k", "x\ny", "--base=b", "--primary=p", "--secondary=s", "--output=o"], "--k"),
        (["blend"], "'blend'"),
        (["blend\nhsa: error: forged"], "blend"),
        (["--nonsense"], "--nonsense"),
        (["demo", "extra"], "extra"),
    ],
)
def test_usage_errors_are_one_line(refuse: Refuse, arguments: list[str], expected: str) -> None:
    refuse(arguments, expected, "See: hsa ", "--help", dry=False)


def test_a_stray_argument_is_an_error(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse([*merge_arguments(triple, output), "stray"], "stray", "See: hsa merge --help")
