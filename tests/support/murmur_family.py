"""A plugin file with a family of models: Whisper under other names, as a user would write one for `HSA_PLUGINS`.

Its tensors lie in `speech_encoder` and `text_decoder`, and so its config.json names heads and layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hsa.architectures import Architecture, ExpectedTensor, ModelClass, Preset, TensorPlace, Tie
from hsa.architectures.whisper import WHISPER

STACKS = {"speech_encoder": "encoder", "text_decoder": "decoder"}


def theirs(name: str) -> str:
    """Whisper's name of a tensor or a key; what is not Murmur's becomes one that is not Whisper's."""
    for murmur, whisper in STACKS.items():
        if name.startswith(murmur):
            return whisper + name.removeprefix(murmur)
    return f"no.{name}" if name.startswith(("encoder", "decoder")) else name


def ours(name: str) -> str:
    """Murmur's name for Whisper's of a tensor or a key."""
    for murmur, whisper in STACKS.items():
        if name.startswith(whisper):
            return murmur + name.removeprefix(whisper)
    return name


class Murmur(Architecture):
    name = "murmur"
    title = "Murmur"
    tags = ("murmur",)
    model_types = frozenset({"murmur"})
    all_stacks = tuple(STACKS)
    blocks = WHISPER.blocks
    first_target = ours(WHISPER.first_target)
    defaults: Mapping[str, Any] = {ours(key): value for key, value in WHISPER.defaults.items()}
    width = WHISPER.width
    tie = Tie(WHISPER.tie.output, ours(WHISPER.tie.embedding), WHISPER.tie.size_keys)
    features = WHISPER.features

    def knows(self, name: str) -> bool:
        return WHISPER.knows(theirs(name))

    def place(self, name: str) -> TensorPlace | None:
        place = WHISPER.place(theirs(self.canonical(name)))
        return None if place is None else replace(place, name=ours(place.name), stack=ours(place.stack))

    def group_of(self, name: str) -> tuple[str, str]:
        stack, kind = WHISPER.group_of(theirs(self.canonical(name)))
        return ours(stack), kind

    def layers_key_of(self, name: str) -> str | None:
        key = WHISPER.layers_key_of(theirs(name))
        return None if key is None else ours(key)

    def model_class(self, config: Mapping[str, Any]) -> ModelClass:
        return ModelClass(
            "MurmurForSpeech",
            description="Murmur speech recognition model",
            task="automatic-speech-recognition",
            use="Speech recognition",
            processor="MurmurProcessor",
            reads_tokens=True,
        )

    def expected(self, config: Mapping[str, Any], where: str) -> Iterator[ExpectedTensor]:
        self.counts(config, where)
        whisper = {theirs(key): value for key, value in config.items()} | {"model_type": "whisper"}
        for entry in WHISPER.expected(whisper, where):
            keys = tuple(None if key is None else ours(key) for key in entry.size_keys)
            required_by = None if entry.required_by is None else ours(entry.required_by)
            yield ExpectedTensor(ours(entry.name), entry.shape, keys, required_by)

    def expected_targets(self, layers: Mapping[str, int], preset: Preset) -> Iterator[str]:
        return map(ours, WHISPER.expected_targets({STACKS[stack]: count for stack, count in layers.items()}, preset))


MURMUR = Murmur()
