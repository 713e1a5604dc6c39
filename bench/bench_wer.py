"""Word error rate of merges on speech that neither fine-tune has seen: the benchmark that shows why anybody merges.

    python bench/bench_wer.py --triple DIR [--clips DIR] [--limit N] [--batch N] [--results DIR]

The triple holds `base`, `primary` and `secondary` checkpoints (default: HSA_REAL_TRIPLE), the clips FLAC files of at
most 30 seconds and `transcripts.tsv` with lines of file, tab, text (default: HSA_REAL_CLIPS, else `clips` in the
triple). One model is loaded, primary in float32; sources keep the dtype of their files, and every variant is written
into that model: merges by `hsa.Merger.apply_`, which rounds once, to float32. No figures without a correctness gate:
what `apply_` leaves in the model must be, bit for bit, the checkpoint that `hsa.merge` writes in float32.

SA is SA Merge's scope (attention-qkv, k 1) with one lambda for all layers; its coefficients per layer range would have
to be tuned. Decoding is greedy, in English; texts go through Whisper's own normaliser, which also removes hesitations
such as "um". Rates are in % of all words; intervals are 95 % bootstraps over clips, paired where they are of the
difference to primary. Variants with equal values are one model: it is transcribed once and its seconds stand in each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from blake3 import blake3
from cases import CAVEATS
from safetensors.torch import load_file

import hsa
from hsa.architectures.whisper import WHISPER

ROLES = ("base", "primary", "secondary")
PACKAGES = ("torch", "numpy", "transformers", "jiwer", "soundfile")
MAX_NEW_TOKENS = 224
"""Half of Whisper's text context, where OpenAI's own decoding stops too."""
RESAMPLES = 10_000
SEED = 0

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A source by its role, the plain average of primary and secondary, or, with targets, a merge."""

    name: str
    targets: str = ""
    k: float = 0.0
    lam: float = 0.0
    alpha: float = 0.0

    @property
    def parameters(self) -> dict[str, float]:
        return {"k": self.k, "lam": self.lam, "alpha": self.alpha} if self.targets else {}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name} {value:g}" for name, value in self.parameters.items())])


VARIANTS = (
    *map(Variant, ("base", "primary", "secondary", "average")),
    *(Variant("SA", "attention-qkv", 1.0, lam, 0.2) for lam in (0.1, 0.5)),
    Variant("HSA", "encoder-qkv", 0.2, 0.1, 0.2),
    *(Variant("HSA", "encoder-qkv", k, lam, 0.2) for k in (0.6, 1.0) for lam in (0.1, 0.5)),
    Variant("HSA", "encoder-qkv", 0.6, 0.3, 1.0),
    Variant("HSA", "encoder-qkv", 1.0, 0.1, 2.0),
)
"""At alpha 0.2 lambda_i stays above 0.63 for every lambda of at least 0.1; the last two rows go further."""
GATED = (Variant("HSA", "encoder-qkv", 0.6, 0.3, 1.0), Variant("SA", "attention-qkv", 1.0, 0.3, 1.0))


class LiveModel:
    """The one loaded model, and what is written into it."""

    def __init__(self, triple: Path) -> None:
        self.sources = {role: triple / role for role in ROLES}
        self.states: dict[str, State] = {role: read_state(path) for role, path in self.sources.items()}
        self.model = load_model(self.sources["primary"])
        for name, tensor in parameters_of(self.model).items():
            for role, state in self.states.items():
                if name not in state or state[name].shape != tensor.shape:
                    raise SystemExit(f"{role} holds no {name} of shape {list(tensor.shape)}: all must fit one model")
        self._mergers: dict[str, hsa.Merger] = {}

    def put(self, state: State) -> None:
        """Write a whole state, rounded to the model's float32."""
        with torch.no_grad():
            for name, tensor in parameters_of(self.model).items():
                tensor.copy_(state[name])

    def become(self, variant: Variant) -> None:
        """Write a variant; a merge finds primary in the model, whatever was there before."""
        if variant.targets:
            if variant.targets not in self._mergers:
                self._mergers[variant.targets] = hsa.Merger(**self.sources, targets=variant.targets)
            self.put(self.states["primary"])
            self._mergers[variant.targets].apply_(self.model, **variant.parameters)
        elif variant.name == "average":
            primary, secondary = self.states["primary"], self.states["secondary"]
            names = parameters_of(self.model)
            self.put({name: (primary[name].float() + secondary[name].float()) / 2 for name in names})
        else:
            self.put(self.states[variant.name])

    def digest(self) -> str:
        """Equal for models of equal values alone; a merge of equal tensors may turn -0 into 0."""
        digest = blake3()
        for tensor in parameters_of(self.model).values():
            digest.update((tensor.detach() + 0.0).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_model(path: Path) -> Any:
    from transformers import WhisperForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def read_state(path: Path) -> State:
    """Every tensor of a checkpoint as stored, by its name without a leading `model.`."""
    files = sorted(path.glob("*.safetensors"))
    return {WHISPER.canonical(name): tensor for file in files for name, tensor in load_file(file).items()}


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors, tied ones once."""
    return {WHISPER.canonical(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def gate_merge(live: LiveModel, folder: Path) -> None:
    """Every tensor of the live model must be the checkpoint's that `hsa.merge` writes, also after another variant."""
    for variant in GATED:
        live.become(Variant("base"))
        live.become(variant)
        out = folder / variant.name
        merge = {"targets": variant.targets, **variant.parameters}
        hsa.merge(**live.sources, output=out, dtype="float32", sync=False, **merge)
        found, expected = parameters_of(live.model), parameters_of(load_model(out))
        wrong = sorted(found.keys() ^ expected.keys())
        wrong += [n for n in found if n in expected and not torch.equal(bits(found[n]), bits(expected[n]))]
        if wrong:
            raise SystemExit(
                f"correctness gate: {wrong[0]} after apply_ ({variant}) differs from what hsa.merge writes; no figures "
                "are reported"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int32)


def gate_scoring(references: Sequence[str], normalise: Callable[[str], str]) -> None:
    """Texts must score no error against themselves, and every word against silence."""
    same, words = count_errors(references, references, normalise)
    silent, _ = count_errors(references, [""] * len(references), normalise)
    if same.any() or (silent != words).any() or not words.sum():
        raise SystemExit(
            f"correctness gate: transcripts score {same.sum()} errors against themselves and {silent.sum()} of "
            f"{words.sum()} against silence; no figures are reported"
        )


def read_clips(folder: Path, limit: int, rate: int, seconds: float) -> tuple[list[np.ndarray], list[str]]:
    """Samples and reference texts of the first `limit` clips, or of all where it is 0."""
    import soundfile

    lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [(file, text) for file, _, text in (line.partition("\t") for line in lines) if file.endswith(".flac")]
    samples: list[np.ndarray] = []
    for file, _ in pairs[: limit or None]:
        heard, found = soundfile.read(folder / file, dtype="float32")
        if found != rate or heard.ndim != 1 or len(heard) > seconds * rate:
            raise SystemExit(
                f"{file}: {found} Hz, shape {heard.shape}; expected one channel of {rate} Hz, at most {seconds:g} s"
            )
        samples.append(heard)
    if not samples:
        raise SystemExit(f"{folder / 'transcripts.tsv'} names no .flac file")
    return samples, [text for _, text in pairs[: len(samples)]]


def make_normaliser(base: Path) -> Callable[[str], str]:
    """Whisper's own, with the British and American spellings that stand beside base's tokenizer, if they do."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    path = base / "normalizer.json"
    return EnglishTextNormalizer(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})


def transcribe(model: Any, tokenizer: Any, features: torch.Tensor, batch: int) -> list[str]:
    """Greedy transcripts of log-mel features [clips, mels, frames]."""
    said: list[str] = []
    english = {"language": "en", "task": "transcribe"} if model.generation_config.is_multilingual else {}
    model.generation_config.max_length = None
    for part in features.split(batch):
        tokens = model.generate(part, num_beams=1, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **english)
        said += tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return said


def count_errors(
    references: Sequence[str], said: Sequence[str], normalise: Callable[[str], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Word errors and reference words of every clip, after normalising: int64 [clips] each."""
    import jiwer

    counts = []
    for reference, heard in zip(references, said, strict=True):
        one = jiwer.process_words(normalise(reference), normalise(heard))
        missed = one.substitutions + one.deletions
        counts.append((missed + one.insertions, missed + one.hits))
    errors, words = np.array(counts, np.int64).reshape(-1, 2).T
    return errors, words


def rate_and_interval(errors: np.ndarray, words: np.ndarray) -> tuple[float, float, float]:
    """100 * errors / words and its 95 % bootstrap interval over clips; the same draws every time, so that they pair."""
    drawn = np.random.default_rng(SEED).integers(0, len(words), (RESAMPLES, len(words)))
    low, high = np.percentile(100 * errors[drawn].sum(1) / words[drawn].sum(1), (2.5, 97.5))
    return round(float(100 * errors.sum() / words.sum()), 2), round(float(low), 2), round(float(high), 2)


@dataclass(frozen=True)
class Scored:
    """What was measured of one variant."""

    variant: Variant
    digest: str
    errors: np.ndarray
    words: np.ndarray
    seconds: float

    def row(self, primary: Scored) -> dict[str, Any]:
        """The measured columns; rates and differences in percentage points."""
        merge = self.variant.parameters
        rate = rate_and_interval(self.errors, self.words)
        against = rate_and_interval(self.errors - primary.errors, self.words)
        return {
            "variant": self.variant.name,
            "targets": self.variant.targets,
            **{name: merge.get(name, "") for name in ("k", "lam", "alpha")},
            "clips": len(self.words),
            "words": int(self.words.sum()),
            "errors": int(self.errors.sum()),
            **dict(zip(("wer", "wer_low", "wer_high"), rate, strict=True)),
            **dict(zip(("against_primary", "against_low", "against_high"), against, strict=True)),
            "seconds": round(self.seconds, 1),
        }


def measure(triple: Path, clips: Path, variants: Iterable[Variant], limit: int, batch: int) -> list[Scored]:
    """Pass the gates, then score every variant in the one live model."""
    from transformers import WhisperProcessor

    live = LiveModel(triple)
    with tempfile.TemporaryDirectory(prefix="hsa-bench-") as scratch:
        gate_merge(live, Path(scratch))
    processor = WhisperProcessor.from_pretrained(live.sources["base"], local_files_only=True)
    extractor = processor.feature_extractor
    samples, references = read_clips(clips, limit, extractor.sampling_rate, extractor.chunk_length)
    normalise = make_normaliser(live.sources["base"])
    gate_scoring(references, normalise)
    features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
    scored: dict[str, Scored] = {}
    out: list[Scored] = []
    for variant in variants:
        started = time.perf_counter()
        live.become(variant)
        digest = live.digest()
        if digest not in scored:
            said = transcribe(live.model, processor.tokenizer, features, batch)
            errors, words = count_errors(references, said, normalise)
            scored[digest] = Scored(variant, digest, errors, words, time.perf_counter() - started)
            print(f"{variant}: {errors.sum()} errors, {scored[digest].seconds:.1f} s", file=sys.stderr, flush=True)
        out.append(replace(scored[digest], variant=variant))
    return out


def model_name(triple: Path) -> str:
    """Which Whisper the triple is of, as base's config says, or else the triple's own name."""
    config = json.loads((triple / "base" / "config.json").read_text(encoding="utf-8"))
    said = Path(config.get("_name_or_path") or "").name.removeprefix("whisper-")
    return said or triple.resolve().name


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    head = ["variant", "targets", "k", "lambda", "alpha", "WER %", "95 %", "against primary", "95 %", "s"]
    formats = (
        *("{variant}", "{targets}", "{k}", "{lam}", "{alpha}", "{wer:.2f}", "{wer_low:.2f} to {wer_high:.2f}"),
        *("{against_primary:+.2f}", "{against_low:+.2f} to {against_high:+.2f}", "{seconds}"),
    )
    return rows.markdown(head, ([cell.format(**row) for cell in formats] for row in measured))


def same_models(scored: Sequence[Scored]) -> list[str]:
    """A line for every group of variants that are one model."""
    groups: dict[str, list[str]] = {}
    for each in scored:
        groups.setdefault(each.digest, []).append(str(each.variant))
    return [f"One model, value for value: {'; '.join(names)}." for names in groups.values() if len(names) > 1]


def why_not(triple: Path | None, clips: Path | None, roles: Sequence[str] = ROLES) -> str:
    """Why nothing can be measured of models in these roles, or nothing."""
    if triple is None or clips is None:
        return "HSA_REAL_TRIPLE is not set and --triple not given"
    missing = [f"{role}/config.json" for role in roles if not (triple / role / "config.json").is_file()]
    if missing:
        return f"the triple {triple} holds no {missing[0]}"
    if not (clips / "transcripts.tsv").is_file():
        return f"no clips: {clips} holds no transcripts.tsv; give --clips or HSA_REAL_CLIPS"
    lacking = [name for name in ("jiwer", "soundfile") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} must be installed" if lacking else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triple", type=Path, default=os.environ.get("HSA_REAL_TRIPLE") or None)
    parser.add_argument("--clips", type=Path, default=os.environ.get("HSA_REAL_CLIPS") or None)
    parser.add_argument("--limit", type=int, default=0, help="only the first clips (default: all)")
    parser.add_argument("--batch", type=int, default=20, help="clips transcribed at once")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of wer.csv")
    options = parser.parse_args(arguments)
    clips = options.clips or (options.triple and options.triple / "clips")
    reason = why_not(options.triple, clips)
    if reason:
        print(f"bench_wer measured nothing: {reason}")
        return
    about = {**rows.about(PACKAGES), "model": model_name(options.triple)}
    scored = measure(options.triple, clips, VARIANTS, options.limit, options.batch)
    primary = next(each for each in scored if each.variant.name == "primary")
    measured = [{**about, **each.row(primary)} for each in scored]
    print("\n".join([table(measured), "", *same_models(scored), CAVEATS]))
    rows.append("wer", measured, options.results)


if __name__ == "__main__":
    main()
