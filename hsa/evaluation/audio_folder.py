"""Read an audio folder of Hugging Face's datasets: metadata.csv or metadata.jsonl with file_name and a column of text.

Source: https://huggingface.co/docs/datasets/audio_dataset#audiofolder
"""

from __future__ import annotations

from pathlib import Path

from hsa.evaluation.collector import Collector
from hsa.evaluation.tables import read_table


def read_audio_folder(metadata: Path, *, limit: int | None = None) -> Collector:
    """Read the utterances of a metadata file, whose audio is in the same folder or below. With a `limit`, only that
    many are read.

    Raises the same DataError as `read_table`, also if there is no column file_name.

    Example:
        >>> read_audio_folder(Path("speech/metadata.csv"))  # doctest: +SKIP
    """
    return read_table(metadata, audio=("file_name",), limit=limit)
