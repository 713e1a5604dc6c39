"""Call transformers quietly, and report its failures in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsa.errors import HsaError, MachineError, SourceError
from hsa.option_names import option

FROM_DISK: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments with which transformers reads a directory. It fetches nothing, and refuses code that a config names instead
of asking."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Texts in torch's generic errors that mean that memory has run out."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress warnings and progress bars of transformers inside the block."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Report failures of torch and transformers with a model in one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(f"out of memory with {folder}; lower {option('batch')}, or free some") from error
    except HsaError:
        raise
    except Exception as error:  # of any kind: files are untrusted, and tokenizers raises bare exceptions
        if any(text in str(error) for text in OUT_OF_MEMORY):
            raise MachineError(f"out of memory with {folder}; lower {option('batch')}, or free some") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise SourceError(f"{folder} cannot transcribe: {type(error).__name__}: {lines[0]}") from error
