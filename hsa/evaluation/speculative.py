"""Decode greedily with drafts: what other models wrote for an utterance is verified in one pass of the decoder.

Greedy decoding takes a pass of the decoder for each token. The models of a search differ little and often write the
same, so a whole draft is given to the decoder at once. As long as its likeliest next token is the draft's, the pass has
given the logits of many steps. `model.generate` of transformers stays in charge: it reads these logits step by step,
with all its rules, and its tokens are the result. This is speculative decoding with known texts as drafts.

A pass over many tokens rounds otherwise than one over a single token. Where the two likeliest tokens are closer than
`MARGIN`, rounding might decide between them, and such an utterance is decoded without drafts.

Source: Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MARGIN = 1e-3
"""The least difference between the logits of the two likeliest tokens. Rounding in float32 changes logits of up to 50
by some 1e-5."""

ROUNDS = 6
"""Passes of the decoder over what is guessed. An utterance that is unknown after them is decoded without drafts."""

MOST_TOKENS = 64
"""Tokens of an utterance whose logits are held: 13 MB in float32 with Whisper's vocabulary."""

KEPT = 16
"""Drafts of an utterance that are kept: those that were written most often."""

LONGEST_MATCH, SHIFT = 3, 8
"""Tokens by which the place in a draft is found after a difference, and how far it may have moved."""

Tokens = tuple[int, ...]


class Drafts:
    """What models wrote for one utterance, as tokens with the one that ends the text.

    Example:
        >>> drafts = Drafts()
        >>> drafts.add((5, 6, 7, 8, 9))
        >>> drafts.continuation((5, 6)), drafts.continuation((5, 4, 7))
        ((7, 8, 9), (8, 9))
    """

    def __init__(self) -> None:
        self._counts: dict[Tokens, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, tokens: Tokens) -> None:
        """Count what a model wrote."""
        count = self._counts.pop(tokens, 0) + 1
        if len(self._counts) >= KEPT:
            del self._counts[min(self._counts, key=self._counts.__getitem__)]
        self._counts[tokens] = count

    def continuation(self, tokens: Tokens) -> Tokens:
        """The likeliest tokens after these: of a draft that begins with them, else of one that has the last ones near
        the same place, else of the draft that was written most often. None without drafts."""
        count = len(tokens)
        ordered = sorted(self._counts, key=self._counts.__getitem__, reverse=True)
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


def generate_with_drafts(
    model: Any, inputs: Mapping[str, Any], how: Mapping[str, Any], drafts: Sequence[Drafts]
) -> list[list[int]]:
    """The tokens that `model.generate` writes for each utterance; they are added to its drafts.

    Args:
        model: a Whisper.
        inputs: its `input_features`, float32 [utterances, mel bands, frames].
        how: arguments of `generate` for greedy decoding, with `max_new_tokens`.
        drafts: what other models wrote for each utterance; where all are empty, they are of no help.
    """
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if any(drafts):
        barred = config.suppress_tokens or (), config.begin_suppress_tokens or ()
        forward = SpeculativeForward(model.forward, drafts, how["max_new_tokens"], ends, *barred)
        with forward_replaced(model, forward):
            found = model.generate(**inputs, **how, use_cache=False).tolist()
        if forward.left:
            for number, tokens in zip(forward.left, _without_drafts(model, forward, how), strict=True):
                found[number] = tokens
    else:
        found = model.generate(**inputs, **how).tolist()
    padding = [config.pad_token_id] if config.pad_token_id is not None else []
    for tokens, known in zip(found, drafts, strict=True):
        known.add(up_to_end(tokens, [*ends, *padding]))
    return list(found)


def _without_drafts(model: Any, forward: SpeculativeForward, how: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of the utterances that are left."""
    from transformers.modeling_outputs import BaseModelOutput

    states = BaseModelOutput(last_hidden_state=forward.states[forward.left])
    return list(model.generate(encoder_outputs=states, **how).tolist())


@dataclass
class _Utterance:
    """An utterance under way: the prompt with the tokens that are known, and the logits that gave each of them.

    `known` says that these are all tokens, `read` that they were all given to `generate`.
    """

    drafts: Drafts
    tokens: list[int]
    prompt: int
    logits: list[Any] = field(default_factory=list)
    known: bool = False
    read: bool = False

    @property
    def written(self) -> int:
        """How many tokens after the prompt are known."""
        return len(self.tokens) - self.prompt

    def guess(self, most: int) -> list[int]:
        """The tokens that are known and those that are guessed to follow, at most so many after the prompt."""
        likely = self.drafts.continuation(tuple(self.tokens[self.prompt :]))
        return self.tokens + list(likely[: most - self.written])


class SpeculativeForward:
    """Stands for a model's `forward` in one call of `generate` with `use_cache=False`, which gives it all tokens so
    far. It answers from logits that passes over drafts have given.

    Where it knows no more, it lets the text end. `left` has the numbers of these utterances and `states` the encoder
    states of all, so that the caller can decode them without drafts.

    Args:
        forward: the model's own.
        drafts: those of each utterance of the batch; one without drafts is left.
        limit: tokens that an utterance may have at most.
        ends: the tokens that end a text.
        barred: tokens that are never written.
        barred_first: tokens that are not written first.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        drafts: Sequence[Drafts],
        limit: int,
        ends: Collection[int],
        barred: Sequence[int] = (),
        barred_first: Sequence[int] = (),
    ) -> None:
        self._forward, self._drafts, self._ends = forward, drafts, frozenset(ends)
        self._barred, self._barred_first = list(barred), list(barred_first)
        self._most, self._limit = min(limit, MOST_TOKENS), limit
        self._utterances: list[_Utterance] = []
        self._ended: Any = None
        self._left: set[int] = set()
        self.states: Any = None

    @property
    def left(self) -> list[int]:
        """The numbers of the utterances that must be decoded without drafts."""
        return sorted(self._left)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        ids, encoded = keywords.get("decoder_input_ids"), keywords.get("encoder_outputs")
        if arguments or ids is None or encoded is None or len(ids) != len(self._drafts):
            return self._forward(*arguments, **keywords)  # such as the call that detects the language
        if not self._utterances:
            self.states = encoded[0]
            self._verify(ids.tolist())
        return self._answer(ids)

    def _verify(self, prompts: list[list[int]]) -> None:
        """Find out what the model writes, as far as `ROUNDS` passes go."""
        pairs = zip(self._drafts, prompts, strict=True)
        self._utterances = [_Utterance(drafts, prompt, len(prompt)) for drafts, prompt in pairs]
        unknown = [number for number, drafts in enumerate(self._drafts) if drafts]
        shared: Any = None
        for _ in range(ROUNDS):
            if not unknown:
                break
            rows = [self._utterances[number] for number in unknown]
            guesses = [row.guess(self._most) for row in rows]
            logits, shared = self._pass(guesses, self.states[unknown], shared)
            followed = [self._accept(*each) for each in zip(rows, guesses, logits, strict=True)]
            going_on = [place for place, row in enumerate(rows) if followed[place] and not row.known]
            unknown = [unknown[place] for place in going_on]
            shared = [(keys[going_on], values[going_on]) for keys, values in shared]
        self._left = {number for number, row in enumerate(self._utterances) if not row.known}

    def _pass(self, guesses: list[list[int]], states: Any, shared: Any) -> tuple[Any, Any]:
        """Logits [utterances, tokens, vocabulary] of one pass. `shared` are the keys and values that the decoder's
        layers make of the encoder states, which later passes take over; given again."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        longest = max(map(len, guesses))
        ids = torch.tensor([guess + [0] * (longest - len(guess)) for guess in guesses], device=states.device)
        made = DynamicCache()
        for layer, (keys, values) in enumerate(shared or ()):
            made.update(keys, values, layer)
        found = self._forward(
            decoder_input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=EncoderDecoderCache(DynamicCache(), made),
            use_cache=True,
            return_dict=True,
        )
        if self._ended is None:
            self._ended = torch.zeros_like(found.logits[0, 0])
            self._ended[list(self._ends)] = 1.0
        layers = found.past_key_values.cross_attention_cache.layers
        return found.logits, [(layer.keys, layer.values) for layer in layers]

    def _accept(self, row: _Utterance, guess: list[int], logits: Any) -> bool:
        """Take over the guessed tokens that the logits confirm, and the first one that they give instead. False where
        the text cannot be followed any further."""
        found = logits[len(row.tokens) - 1 : len(guess)]
        scores = found.float().clone()
        scores[:, self._barred] = -float("inf")
        if not row.written:
            scores[0, self._barred_first] = -float("inf")
        best, likeliest = scores.topk(2)
        sure = (best[:, 0] - best[:, 1] >= MARGIN).tolist()
        taken = 0
        for token, is_sure in zip(likeliest[:, 0].tolist(), sure, strict=True):
            if not is_sure or row.written == self._most:
                break
            row.tokens.append(token)
            taken += 1
            row.known = token in self._ends or row.written == self._limit
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
                self._left.add(number)  # generate has taken another token by a rule of its own
            row.read = row.read or count - row.prompt >= len(row.logits)
            is_known = number not in self._left and not row.read
            rows.append(row.logits[count - row.prompt] if is_known else self._ended)
        return Seq2SeqLMOutput(logits=torch.stack(rows)[:, None])


@contextmanager
def forward_replaced(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model be called by another forward. Its signature stays the model's own, which transformers looks at."""
    own = model.__dict__.get("forward")
    model.forward = functools.wraps(model.forward)(lambda *arguments, **keywords: forward(*arguments, **keywords))
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def up_to_end(tokens: Sequence[int], ends: Sequence[int]) -> Tokens:
    """Generated tokens, closed by the first of `ends`. `generate` leaves the end out of the longest text of a batch,
    and may write padding in its place.

    Example:
        >>> up_to_end([7, 8, 0, 0], (0,)), up_to_end([7, 8], (0,))
        ((7, 8, 0), (7, 8, 0))
    """
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return (*tokens[:place], ends[0])
