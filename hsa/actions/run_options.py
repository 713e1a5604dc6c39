"""The options of a run besides its sources and its method's settings; each option is declared here and nowhere else.

Command-line options, Python keywords and recipe keys are generated from these fields. The module imports nothing heavy,
so that help answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsa.methods.settings import check_value, declared, setting
from hsa.sources.roles import Role
from hsa.system.threads import MOST_ALLOWED


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Options that shape the output besides the method's settings. `{roles}` in a help text stands for those of the
    sources."""

    assets_from: Role = setting(
        None,
        "Whose tokenizer and processor files: {roles}.",
        group="sources",
        metavar="ROLE",
        default_text="the anchor's",
    )
    max_shard_size: str | int | None = setting(
        None,
        "Such as 5GB.",
        python="Bytes, or a size such as `5GB`; by default the anchor's own shards.",
        group="output",
        metavar="SIZE",
        default_text="the anchor's own shards",
    )
    card: Mapping[str, str] | None = setting(
        None,
        "Model card field; repeat.",
        python="Model card fields, of `hsa.outputs.card.FIELDS`.",
        group="output",
        metavar="FIELD=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """All options of a run: those that shape its output, and those that say how it runs."""

    backend: str = setting("auto", "auto, cpu or triton.", group="machine", metavar="NAME")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", group="machine", metavar="NAME")
    threads: int | None = setting(
        None,
        "Worker threads.",
        whole=True,
        low=1,
        high=MOST_ALLOWED,
        group="machine",
        metavar="N",
        default_text="cores + 1",
    )
    digest: bool = setting(
        True,
        "Leave out digests of whole files.",
        python="Record BLAKE3 digests of whole files.",
        group="output",
    )
    sync: bool = setting(
        True,
        "Do not wait for the disk.",
        python="Fsync everything before the output appears.",
        group="output",
    )
    overwrite: bool = setting(False, "Replace an earlier output.")
    strict: bool = setting(False, "Make warnings errors: nothing is written then.")

    def __post_init__(self) -> None:
        for each in declared(type(self)):
            check_value(each, getattr(self, each.name))
