"""Run this package's merge with the reference script's command line: only the program's name changes.

    python -m hsa.integrations.reference_script --pretrained-model B --model1 M1 --model2 M2 --out-path OUT
        [--lambda 0.5 | --lambdas 0.0,0.1,...] [--alpha 0.2] [--k-percent 0.6] [--processor-source model1] ...

By default it uses the script's own numerics: the tensors equal the script's bit for bit. They are streamed, and written
as complete checkpoints with card and provenance. With several lambdas, each gets its own sub-directory. All runs are
planned and checked before the first one starts. An earlier output of this program is replaced, as the script replaces
its own; any other existing output is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hsa.actions.merge import dry_run, run_merge
from hsa.actions.request import Request
from hsa.errors import RequestError, one_line, shown
from hsa.methods.hsa import HsaSettings
from hsa.option_names import renamed, spelled
from hsa.sources.roles import Role
from hsa.system.console import exit_with, guarded
from hsa.system.streams import print_stderr, print_stdout

OPTIONS = {
    "base": "--pretrained-model",
    "primary": "--model1",
    "secondary": "--model2",
    "output": "--out-path",
    "lam": "--lambda",
    "alpha": "--alpha",
    "k": "--k-percent",
    "num_heads": "--num-heads",
    "num_layers": "--num-encoder-layers",
    "device": "--device",
    "assets_from": "--processor-source",
    "attention_scale": "--attention-scale",
    "non_attention_scale": "--non-attention-scale",
    "numerics": "--numerics",
    "load_dtype": "--load-dtype",
    "threads": "--threads",
    "debug": "--debug",
}
"""The script's options for this package's arguments, for use in messages."""

PROCESSOR_SOURCES: dict[str, Role] = {"model1": "primary", "model2": "secondary", "pretrained": "base"}


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line like any other bad request: on one line."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}. See: {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of the script's options, with the script's names and defaults, and of a few of this package's."""
    script = _Parser(
        prog="python -m hsa.integrations.reference_script",
        description="Headwise Selective Attention merge with the reference script's command line.",
    )
    add = script.add_argument
    add("--pretrained-model", "--model-class", default="openai/whisper-small.en", help="base")
    add("--model1", required=True, help="primary: kept wherever nothing is merged")
    add("--model2", required=True, help="secondary: blended into the selected heads")
    add("--out-path", "--outdir", required=True, type=Path, help="directory to write")
    add("--lambda", "--lamda", dest="lam", type=float, default=None, help="weight of model1 in a merged head (0.5)")
    add("--lambdas", default=None, help="comma list; several make one sub-directory each")
    add("--alpha", type=float, default=0.2, help="layer exponent (0.2)")
    add("--k-percent", type=float, default=0.6, help="share of heads merged, or a percentage (0.6)")
    add("--num-heads", type=int, default=None, help="instead of what the config says")
    add("--num-encoder-layers", type=int, default=None, help="instead of what the config says")
    add("--device", default="cpu", help="with exact numerics, where to compute; reference numerics run on the CPU")
    add("--processor-source", choices=tuple(PROCESSOR_SOURCES), default="model1", help="whose processor files")
    add("--save-lambda-subdirs", action="store_true", help="a sub-directory for a single lambda too")
    add("--attention-scale", type=float, default=1.0, help="factor on the targets' task vectors")
    add("--non-attention-scale", type=float, default=1.0, help="factor on all other task vectors")
    additional = script.add_argument_group("not in the script")
    additional.add_argument(
        "--numerics", choices=("reference", "exact"), default="reference", help="reference: the script's"
    )
    additional.add_argument(
        "--load-dtype", choices=("auto", "float32"), default="auto", help="float32: as transformers 4 read"
    )
    additional.add_argument("--threads", type=int, default=None, help="worker threads")
    additional.add_argument("--debug", action="store_true", help="add the traceback to an error")
    return script


def lambdas(options: argparse.Namespace) -> list[float]:
    """The lambdas to merge with, in the order given. Raises RequestError for values that are not numbers."""
    if not options.lambdas:
        return [0.5 if options.lam is None else options.lam]
    texts = [text.strip() for text in options.lambdas.split(",") if text.strip()]
    try:
        values = [float(text) for text in texts]
    except ValueError:
        raise RequestError(f"--lambdas must be numbers with commas between, got {shown(options.lambdas)}") from None
    if not values:
        raise RequestError(f"--lambdas names no number: {shown(options.lambdas)}")
    return values


def directory_name(lam: float, alpha: float) -> str:
    """`lamda_5_alpha_0p2` for 0.5 and 0.2: ten times lambda if that is an integer, else its decimals with `p`."""
    tenths = lam * 10.0
    if math.isclose(tenths, round(tenths), rel_tol=0.0, abs_tol=1e-8):
        return f"lamda_{round(tenths)}_alpha_{_decimals(alpha)}"
    return f"lamda_{_decimals(lam)}_alpha_{_decimals(alpha)}"


def _decimals(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".").replace(".", "p")


def requests(options: argparse.Namespace) -> list[Request]:
    """One request for each lambda. Raises RequestError if a value is out of range, or if two outputs share a name."""
    values = lambdas(options)
    exact = options.numerics == "exact"
    configs = [
        HsaSettings(
            k=options.k_percent,
            lam=value,
            alpha=options.alpha,
            attention_scale=options.attention_scale,
            non_attention_scale=options.non_attention_scale,
            num_heads=options.num_heads,
            num_layers=options.num_encoder_layers,
            numerics=options.numerics,
            load_dtype=options.load_dtype,
        )
        for value in values
    ]
    outputs = [options.out_path] * len(values)
    if len(values) > 1 or options.save_lambda_subdirs:
        names = [directory_name(value, options.alpha) for value in values]
        if len(set(names)) < len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise RequestError(
                f"--lambdas holds values that would share the directory {duplicate}; leave one of them out"
            )
        outputs = [options.out_path / name for name in names]
    return [
        Request(
            sources={"base": options.pretrained_model, "primary": options.model1, "secondary": options.model2},
            output=output,
            settings=config,
            device=options.device if exact else "cpu",
            threads=options.threads,
            assets_from=PROCESSOR_SOURCES[options.processor_source],
            overwrite=True,
        )
        for config, output in zip(configs, outputs, strict=True)
    ]


def run(arguments: Sequence[str]) -> int:
    """Run a command line of the script and return the exit code; see `hsa.system.console.guarded`."""

    def work() -> int:
        options = parser().parse_args(arguments)
        merges = requests(options)
        for request in merges:
            dry_run(request)
        if options.numerics == "reference" and options.device != "cpu":
            _print_line(f"note: reference numerics run on the CPU; --device {options.device} has no effect")
        for request in merges:
            report = run_merge(request)
            for warning in report.warnings:
                _print_line(f"warning: {warning}")
            for note in report.notes:
                _print_line(f"note: {note}")
            done = f"the output {report.output} is whole"
            print_stdout(one_line(f"[SAVE] {report.output}"), done=done)
            print_stdout(
                f"[INFO] lambda={float(report.parameters['lambda']):.4f}; hsa_target_tensors={len(report.tensors)}; "
                f"selected_heads={report.selected_heads}/{report.total_heads}",
                done=done,
            )
        return 0

    with spelled(renamed(OPTIONS, "hsa merge")):
        return guarded(work, debug="--debug" in arguments)


def _print_line(text: str) -> None:
    print_stderr(f"hsa: {one_line(text)}")


if __name__ == "__main__":
    exit_with(lambda: run(sys.argv[1:]))
