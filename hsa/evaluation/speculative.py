"""Decode greedily with drafts: the texts of other models for an utterance are verified in one pass of the decoder.

Greedy decoding takes one decoder pass per token. The models of a search differ little and often write the same text, so
a whole draft is given to the decoder at once. While its likeliest next token equals the draft's, one pass gives the
logits of many steps. `model.generate` of transformers stays in charge: it reads these logits step by step, with all its
rules, and its tokens are the result. This is speculative decoding with known texts as drafts.

A pass over many tokens rounds differently from one over a single token. If the two likeliest tokens are closer than
`MARGIN`, rounding might decide between them, and the utterance is decoded without drafts. A model whose generation
config has rules that are not in `KNOWN_RULES` gets no drafts.

Source: Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MARGIN, SIZE = 1e-3, 50.0
"""The least difference between the logits of the two likeliest tokens, for logits of up to `SIZE`. Larger logits need a
proportionally larger difference. Rounding in float32 changes logits of this size by about 1e-5."""

ROUNDS = 6
"""Maximum decoder passes over guessed tokens. Utterances still incomplete after them are decoded without drafts."""

MOST_TOKENS, FEWEST_TOKENS = 64, 24
"""Maximum tokens of an utterance whose logits are kept: 13 MB in float32 with Whisper's vocabulary. If the memory
allows fewer than the second number, drafts are not worth a pass."""

MOST_BYTES = 256 << 20
"""Maximum bytes of the logits of a batch. A pass takes as many again."""

KEPT = 8
"""Maximum drafts that are kept of an utterance: those that were written most often."""

LONGEST_MATCH, SHIFT = 3, 8
"""Maximum tokens that are matched to find the place in a draft after a difference, and its maximum shift."""

KNOWN_RULES = frozenset(
    (
        "_from_model_config",
        "alignment_heads",
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "forced_decoder_ids",
        "is_multilingual",
        "lang_to_id",
        "language",
        "max_initial_timestamp_index",
        "max_length",
        "max_new_tokens",
        "median_filter_width",
        "no_timestamps_token_id",
        "num_beams",
        "pad_token_id",
        "prev_sot_token_id",
        "return_timestamps",
        "suppress_tokens",
        "task",
        "task_to_id",
        "transformers_version",
        "use_cache",
    )
)
"""Entries of a generation config with which drafts are known to change no text."""

Tokens = tuple[int, ...]


class _OtherWindowError(Exception):
    """`generate` has begun another window of the audio, which the drafts do not cover."""


class Drafts:
    """The texts that models wrote for one utterance, as tokens including the end token.

    Example:
        >>> drafts = Drafts()
        >>> drafts.add((5, 6, 7, 8, 9))
        >>> drafts.continuation((5, 6)), drafts.continuation((5, 4, 7))
        ((7, 8, 9), (8, 9))
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, tokens: Tokens) -> None:
        """Count a text that a model wrote. A text of more than `MOST_TOKENS` tokens is not kept."""
        if len(tokens) > MOST_TOKENS:
            return
        key = array("q", tokens).tobytes()
        count = self._counts.pop(key, 0) + 1
        if len(self._counts) >= KEPT:
            del self._counts[min(self._counts, key=self._counts.__getitem__)]
        self._counts[key] = count

    def continuation(self, tokens: Tokens) -> Tokens:
        """The likeliest tokens after these. They come from a draft that begins with these tokens, else from one with
        the same last tokens near this place, else from the most frequent draft. Empty without drafts."""
        count = len(tokens)
        ordered = [tuple(array("q", key)) for key in sorted(self._counts, key=self._counts.__getitem__, reverse=True)]
        for draft in ordered:
            if draft[:count] == tokens:
                return draft[count:]
        for length in range(min(LONGEST_MATCH, count), 0, -1):
            for draft in ordered:
                places = [
                    place
                    for place in range(max(length, count - SHIFT), min(len(draft), count + SHIFT + 1))
                    if draft[place - length : place] == tokens[count - length :]
                ]
                if places:
                    return draft[min(places, key=lambda place: abs(place - count)) :]
        return ordered[0][count:] if ordered else ()


def may_draft(model: Any, special: Collection[int]) -> bool:
    """Whether drafts are known to change no text of a Whisper: in float32 on a CPU, with known generation rules.

    Drafts have not been tried on a GPU. `special` are the tokenizer's special tokens, which texts leave out.
    """
    import torch

    config = model.generation_config
    rules = {name for name, value in config.to_diff_dict().items() if value not in (None, False)}
    return (
        model.dtype == torch.float32
        and model.device.type == "cpu"
        and torch.get_float32_matmul_precision() == "highest"
        and not torch.is_autocast_enabled("cpu")
        and rules <= KNOWN_RULES
        and not getattr(config, "return_timestamps", False)
        and isinstance(config.eos_token_id, int)
        and config.pad_token_id in special
    )


def generate_with_drafts(
    model: Any, inputs: Mapping[str, Any], how: Mapping[str, Any], drafts: Sequence[Drafts]
) -> list[list[int]]:
    """The tokens that `model.generate` writes for each utterance; they are added to its drafts.

    Args:
        model: a Whisper for which `may_draft` is true.
        inputs: its `input_features`, float32 [utterances, mel bands, frames].
        how: arguments of `generate` for greedy decoding, with `max_new_tokens`.
        drafts: the texts of other models for each utterance. If all are empty, they have no effect.
    """
    config = model.generation_config
    found = _with_drafts(model, inputs, how, drafts) if any(drafts) else None
    if found is None:
        found = model.generate(**inputs, **how).tolist()
    for tokens, known in zip(found, drafts, strict=True):
        known.add(up_to_end(tokens, [config.eos_token_id, config.pad_token_id]))
    return found


def _with_drafts(
    model: Any, inputs: Mapping[str, Any], how: Mapping[str, Any], drafts: Sequence[Drafts]
) -> list[list[int]] | None:
    """Like `generate_with_drafts`, but only with drafts; None if they cannot help."""
    config, limit = model.generation_config, how["max_new_tokens"]
    most = min(limit, MOST_TOKENS, MOST_BYTES // (4 * model.config.vocab_size * len(drafts)))
    if most < min(limit, FEWEST_TOKENS):
        return None
    barred = config.suppress_tokens or (), config.begin_suppress_tokens or ()
    forward = SpeculativeForward(model.forward, drafts, most, limit, config.eos_token_id, *barred)
    try:
        with replaced_forward(model, forward):
            found: list[list[int]] = model.generate(**inputs, **how, use_cache=False).tolist()
    except _OtherWindowError:
        return None
    left, states = forward.left, forward.states
    del forward  # frees the logits
    if left:
        features = {name: value[left] for name, value in inputs.items()}
        encoder = model.get_encoder()
        known = _KnownStates(encoder.forward, features["input_features"], states[left])
        with replaced_forward(encoder, known):
            rest = model.generate(**features, **how).tolist()
        for number, tokens in zip(left, rest, strict=True):
            found[number] = tokens
    return found


class _KnownStates:
    """Stands for an encoder's forward. It gives the known states of these features, and encodes others."""

    def __init__(self, forward: Callable[..., Any], features: Any, states: Any) -> None:
        self._forward, self._features, self._states = forward, features, states

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        given = arguments[0] if arguments else keywords.get("input_features")
        if isinstance(given, torch.Tensor) and torch.equal(given, self._features):
            return BaseModelOutput(last_hidden_state=self._states)
        return self._forward(*arguments, **keywords)


@dataclass
class _Utterance:
    """An utterance in progress: the prompt with the known tokens, and the logits that gave each of them.

    `known` says that all tokens are known, `read` that `generate` has received them all.
    """

    drafts: Drafts
    tokens: list[int]
    prompt: int
    logits: list[Any] = field(default_factory=list)
    known: bool = False
    read: bool = False

    @property
    def written(self) -> int:
        """The number of known tokens after the prompt."""
        return len(self.tokens) - self.prompt

    def guess(self, most: int) -> list[int]:
        """The known tokens and the guessed ones that follow, at most `most` after the prompt."""
        likely = self.drafts.continuation(tuple(self.tokens[self.prompt :]))
        return self.tokens + list(likely[: most - self.written])


class SpeculativeForward:
    """Replaces a model's `forward` in one call of `generate` with `use_cache=False`, which passes it all tokens so far.
    It answers with the logits of earlier passes over drafts.

    Where no further logits are known, it ends the text. `left` are the indices of these utterances and `states` the
    encoder states of all, so that the caller can decode them without drafts.

    Args:
        forward: the model's own forward.
        drafts: the drafts of each utterance of the batch; an utterance without drafts goes to `left`.
        most: maximum tokens of an utterance that are verified.
        limit: maximum tokens that an utterance may have, not less than `most`.
        end: the token that ends a text.
        barred: tokens that are never written.
        barred_first: tokens that are not written first.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        drafts: Sequence[Drafts],
        most: int,
        limit: int,
        end: int,
        barred: Sequence[int] = (),
        barred_first: Sequence[int] = (),
    ) -> None:
        self._forward, self._drafts = forward, drafts
        self._most, self._limit, self._end = most, limit, end
        self._barred, self._barred_first = list(barred), list(barred_first)
        self._utterances: list[_Utterance] = []
        self._count = 0
        self._ended: Any = None
        self._left: set[int] = set()
        self.states: Any = None

    @property
    def left(self) -> list[int]:
        """The indices of the utterances that must be decoded without drafts."""
        return sorted(self._left)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        ids, encoded = keywords.get("decoder_input_ids"), keywords.get("encoder_outputs")
        if arguments or ids is None or encoded is None:
            return self._forward(*arguments, **keywords)  # for example the call that detects the language
        if not self._utterances and len(ids) == len(self._drafts):
            self.states = encoded[0]
            self._verify(ids.tolist())
        elif len(ids) != len(self._drafts) or ids.shape[1] != self._count + 1:
            raise _OtherWindowError
        self._count = ids.shape[1]
        return self._answer(ids)

    def _verify(self, prompts: list[list[int]]) -> None:
        """Determine the tokens that the model writes, as far as `ROUNDS` passes allow."""
        pairs = zip(self._drafts, prompts, strict=True)
        self._utterances = [_Utterance(drafts, prompt, len(prompt)) for drafts, prompt in pairs]
        unknown = [number for number, drafts in enumerate(self._drafts) if drafts]
        cross: Any = None
        for _ in range(ROUNDS):
            if not unknown:
                break
            rows = [self._utterances[number] for number in unknown]
            guesses = [row.guess(self._most) for row in rows]
            logits, cross = self._pass(guesses, self.states[unknown], cross)
            followed = [self._accept(*each) for each in zip(rows, guesses, logits, strict=True)]
            going_on = [place for place, row in enumerate(rows) if followed[place] and not row.known]
            unknown = [unknown[place] for place in going_on]
            for layer in cross.layers if len(going_on) < len(rows) else ():
                layer.keys, layer.values = layer.keys[going_on], layer.values[going_on]
        self._left = {number for number, row in enumerate(self._utterances) if not row.known}

    def _pass(self, guesses: list[list[int]], states: Any, cross: Any) -> tuple[Any, Any]:
        """Logits [utterances, tokens, vocabulary] of one pass. `cross` is the cache of the decoder layers' keys and
        values for the encoder states, taken from the previous pass."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        longest = max(map(len, guesses))
        ids = torch.tensor([guess + [0] * (longest - len(guess)) for guess in guesses], device=states.device)
        found = self._forward(
            decoder_input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache() if cross is None else cross),
            use_cache=True,
            return_dict=True,
        )
        if self._ended is None:
            self._ended = torch.zeros_like(found.logits[0, 0])
            self._ended[self._end] = 1.0
            count = len(self._ended)
            self._barred, self._barred_first = (
                [token for token in tokens if 0 <= token < count] for tokens in (self._barred, self._barred_first)
            )
        return found.logits, found.past_key_values.cross_attention_cache

    def _accept(self, row: _Utterance, guess: list[int], logits: Any) -> bool:
        """Take the guessed tokens that the logits confirm, and the first token that they give instead. Return False if
        the text cannot be followed any further."""
        found = logits[len(row.tokens) - 1 : len(guess)]
        scores = found.float().clone()
        scores[:, self._barred] = -float("inf")
        if not row.written:
            scores[0, self._barred_first] = -float("inf")
        best, likeliest = scores.topk(2)
        sure = (best[:, 0] - best[:, 1] >= MARGIN * (best[:, 0].abs() / SIZE).clamp(min=1.0)).tolist()
        taken = 0
        for token, is_sure in zip(likeliest[:, 0].tolist(), sure, strict=True):
            if not is_sure or row.written == self._most:
                break
            row.tokens.append(token)
            taken += 1
            row.known = token == self._end or row.written == self._limit
            if row.known or guess[len(row.tokens) - 1 :][:1] != [token]:
                break
        row.logits += found[:taken].clone()
        return bool(taken) and row.written < self._most

    def _answer(self, ids: Any) -> Any:
        """The logits after the tokens so far, [utterances, 1, vocabulary]."""
        import torch
        from transformers.modeling_outputs import Seq2SeqLMOutput

        count, last = ids.shape[1], ids[:, -1].tolist()
        rows = []
        for number, (row, token) in enumerate(zip(self._utterances, last, strict=True)):
            if number not in self._left and not row.read and row.tokens[count - 1] != token:
                self._left.add(number)  # generate chose another token by its own rules
            row.read = row.read or count - row.prompt >= len(row.logits)
            is_known = number not in self._left and not row.read
            rows.append(row.logits[count - row.prompt] if is_known else self._ended)
        return Seq2SeqLMOutput(logits=torch.stack(rows)[:, None])


@contextmanager
def replaced_forward(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a model call another forward. The signature stays the model's own, because transformers inspects it."""
    own = model.__dict__.get("forward")
    model.forward = functools.wraps(model.forward)(lambda *arguments, **keywords: forward(*arguments, **keywords))
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def up_to_end(tokens: Sequence[int], ends: Sequence[int]) -> Tokens:
    """Generated tokens, ended by the first of `ends`. `generate` omits the end token of the longest text in a batch,
    and may write padding in its place.

    Example:
        >>> up_to_end([7, 8, 0, 0], (0,)), up_to_end([7, 8], (0,))
        ((7, 8, 0), (7, 8, 0))
    """
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return (*tokens[:place], ends[0])
