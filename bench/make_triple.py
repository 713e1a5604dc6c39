"""Write a made-up triple in the shape of a published Whisper model.

    python bench/make_triple.py large-v3 OUT [--dtype float32] [--max-shard-size 5GB]

Writes OUT/base, OUT/primary and OUT/secondary. large-v3 in float32 takes 18.5 GB and about a minute.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from cases import ITEM_SIZE, model_bytes

from hsa.system.types import parse_size
from hsa.testing.whisper_checkpoints import SHAPES, write_triple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZE), default="float32")
    parser.add_argument("--max-shard-size", default="5GB")
    options = parser.parse_args()
    needed = 3 * model_bytes(options.shape, options.dtype)
    options.output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.output).free
    if free < needed * 1.01:
        raise SystemExit(f"{needed} bytes are needed in {options.output}, {free} are free")
    started = time.perf_counter()
    write_triple(
        options.output,
        SHAPES[options.shape],
        dtype=options.dtype,
        max_shard_bytes=parse_size(options.max_shard_size),
    )
    print(f"{needed / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s: {options.output}")


if __name__ == "__main__":
    main()
