"""Read the audio of an utterance: soundfile decodes it, channels are averaged, soxr resamples it.

A file is read in blocks. Hours of many channels therefore take no more memory than the result.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hsa.errors import AudioError, DataError, RequestError, shown
from hsa.evaluation.collector import check_times
from hsa.evaluation.extras import needed_for_evaluation
from hsa.evaluation.files import kind_of, open_regular
from hsa.evaluation.utterance import Utterance

if TYPE_CHECKING:
    from hsa.system.dtypes import Float32

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Allowed sampling rates in Hz. A forged header with a rate of 1 would turn every sample into a second."""

MAX_SECONDS = 6 * 3600
"""Maximum seconds of one utterance: at 16 kHz they take 1.4 GB."""

UNKNOWN_LENGTH = 1 << 62
"""The number of samples that libsndfile reports if the header has none."""

MAX_OVERSHOOT = 0.5
"""Seconds by which a segment may end after its file, because times in manifests are rounded. Kaldi's extract-segments
allows as much. Reading then stops at the end of the file."""

BLOCK = 1 << 20
"""Samples read at once, over all channels."""


def read_audio(utterance: Utterance, rate: int) -> Float32:
    """The audio of an utterance at `rate` samples per second: float32, one dimension, one channel.

    Integers are scaled by soundfile to below 1 in magnitude. Channels are averaged. If the file has another rate,
    soxr's HQ filter resamples it. With `start` or `end`, only that part of the file is read, and it is resampled by
    itself.

    Raises AudioError if a file is missing or is not audio, for zero samples, for NaN and infinity, and for times
    outside the file; RequestError if soundfile or soxr is not installed.

    Example:
        >>> read_audio(Utterance("a", Path("a.flac"), ""), 16000).shape  # doctest: +SKIP
        (48000,)
    """
    check_rate(rate)
    with _opened(utterance) as file:
        first, count = _part(utterance, _header(file))
        source = int(file.samplerate)
        blocks = _mixed_blocks(utterance, file, first, count)
        if source == rate:
            audio = _joined(utterance, blocks, count)
        else:
            audio = _joined(utterance, _resampled(blocks, source, rate), count * rate // source + 1)
    if not len(audio):
        raise AudioError(f"{_named(utterance)}: {count} samples at {source} Hz give none at {rate} Hz")
    return audio


class AudioHeader(NamedTuple):
    """The sampling rate of a file in Hz, and its number of samples per channel."""

    rate: int
    frames: int


def read_header(utterance: Utterance) -> AudioHeader:
    """Read the header of an utterance's file. AudioError if the file is missing or is not audio.

    Example:
        >>> read_header(Utterance("a", Path("a.flac"), ""))  # doctest: +SKIP
        AudioHeader(rate=16000, frames=48000)
    """
    with _opened(utterance) as file:
        return _header(file)


def duration(utterance: Utterance, header: AudioHeader | None = None) -> float:
    """The seconds of an utterance's audio, from its times and the header of its file. The header is read unless given.

    Raises the same errors as `read_audio`.

    Example:
        >>> duration(Utterance("a", Path("a.flac"), ""))  # doctest: +SKIP
        3.0
    """
    header = read_header(utterance) if header is None else header
    return _part(utterance, header)[1] / header.rate


def check_audio(utterances: Iterable[Utterance]) -> None:
    """Raise AudioError for the first utterance whose audio file is missing or not a regular file; none is opened.

    Example:
        >>> check_audio(hsa.data("test.tsv").utterances)  # doctest: +SKIP
    """
    checked: set[Path] = set()
    for utterance in utterances:
        if utterance.audio not in checked:
            try:
                mode = os.stat(utterance.audio).st_mode
            except (OSError, ValueError) as error:
                text = error.strerror if isinstance(error, OSError) else error
                raise AudioError(f"{_named(utterance)}: the audio cannot be read: {text}") from error
            if not stat.S_ISREG(mode):
                raise AudioError(f"{_named(utterance)} is {kind_of(mode)}, expected an audio file")
            checked.add(utterance.audio)


def _named(utterance: Utterance) -> str:
    name = shown(utterance.audio, 300)[1:-1]
    return name if utterance.audio.name == utterance.id else f"{name} (utterance {shown(utterance.id, 200)})"


@contextmanager
def _opened(utterance: Utterance) -> Iterator[Any]:
    with needed_for_evaluation("soundfile"):
        import soundfile

    descriptor = open_regular(utterance.audio, "an audio file", AudioError)
    try:
        with soundfile.SoundFile(descriptor, closefd=False) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{_named(utterance)} cannot be decoded: {error.error_string} expected WAV, FLAC, MP3, Ogg or what else "
            f"libsndfile reads"
        ) from error
    finally:
        os.close(descriptor)


def _header(file: Any) -> AudioHeader:
    return AudioHeader(int(file.samplerate), int(file.frames))


def _part(utterance: Utterance, header: AudioHeader) -> tuple[int, int]:
    """The offset of the utterance's first sample in its file, and its number of samples."""
    where, (rate, frames) = _named(utterance), header
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(f"{where} has {rate} samples per second, expected {LOWEST_RATE} to {HIGHEST_RATE}")
    if frames >= UNKNOWN_LENGTH:
        raise AudioError(f"{where} does not say how long it is; convert it again, into a file instead of a pipe")
    if frames <= 0:
        raise AudioError(f"{where} has no samples; take it out of the manifest")
    try:
        check_times(where, utterance.start, utterance.end)
    except DataError as error:
        raise AudioError(str(error)) from error
    start = utterance.start or 0.0
    end = frames / rate if utterance.end is None else utterance.end
    if start * rate >= frames or end > frames / rate + MAX_OVERSHOOT:
        raise AudioError(f"{where} has {frames / rate:.3f} s, expected it to hold {start} to {end} s")
    if min(end, frames / rate) - start > MAX_SECONDS:
        raise AudioError(f"{where}: an utterance of more than {MAX_SECONDS} s; give parts of it, with start and end")
    first, last = round(start * rate), min(round(end * rate), frames)
    if last <= first:
        raise AudioError(f"{where}: no sample between {start} and {end} s at {rate} samples per second")
    return first, last - first


def _mixed_blocks(utterance: Utterance, file: Any, first: int, count: int) -> Iterator[Float32]:
    """Yield the samples of one part of a file, channels averaged."""
    import numpy as np

    if first:
        file.seek(first)
    step, left = max(1, BLOCK // file.channels), count
    while left:
        block = file.read(min(step, left), dtype="float32", always_2d=True)
        if not len(block):
            done, wanted = count - left, count / file.samplerate
            raise AudioError(
                f"{_named(utterance)}: {done / file.samplerate:.3f} of {wanted:.3f} s can be read; the file is cut off"
            )
        left -= len(block)
        _check_finite(utterance, block)
        with np.errstate(over="ignore"):  # `_joined` checks for infinity
            mixed = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        yield mixed


def _resampled(blocks: Iterable[Float32], source: int, target: int) -> Iterator[Float32]:
    """Yield the blocks resampled to another rate."""
    with needed_for_evaluation("soxr"):
        import soxr
    import numpy as np

    stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality=soxr.HQ)
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)


def _joined(utterance: Utterance, pieces: Iterable[Float32], most: int) -> Float32:
    """Join pieces of at most `most` samples together into one array. Joining a list would hold all samples twice."""
    import numpy as np

    audio = np.empty(most, dtype=np.float32)
    filled = 0
    for piece in pieces:
        _check_finite(utterance, piece)
        audio[filled : filled + len(piece)] = piece
        filled += len(piece)
    return audio[:filled]


def _check_finite(utterance: Utterance, samples: Float32) -> None:
    import numpy as np

    if not np.isfinite(samples).all():
        raise AudioError(
            f"{_named(utterance)}: NaN or infinity in the audio, expected finite samples; convert it again"
        )


def check_rate(rate: int) -> None:
    """Raise RequestError unless audio can be resampled to this rate, in samples per second.

    Example:
        >>> check_rate(16000)
    """
    if isinstance(rate, bool) or not isinstance(rate, int) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise RequestError(f"rate must be {LOWEST_RATE} to {HIGHEST_RATE} samples per second, got {shown(rate)}")
