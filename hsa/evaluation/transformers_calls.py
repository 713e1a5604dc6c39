"""Call transformers quietly, and say in one line what it could not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsa.errors import HsaError, MachineError, SourceError
from hsa.option_names import option

FROM_DISK: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a directory: it fetches nothing, and refuses code that a config names instead of asking."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says in errors of no class of their own where memory runs out."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without warnings and progress bars of transformers, which is as talkative as before afterwards."""
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
    """Say in one line what torch and transformers could not do with a model."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(f"out of memory with {folder}; lower {option('batch')}, or free some") from error
    except HsaError:
        raise
    except Exception as error:  # of any kind: files may hold anything, and the tokenizers' library raises bare ones
        if any(text in str(error) for text in OUT_OF_MEMORY):
            raise MachineError(f"out of memory with {folder}; lower {option('batch')}, or free some") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise SourceError(f"{folder} cannot transcribe: {type(error).__name__}: {lines[0]}") from error
