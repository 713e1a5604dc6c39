"""Checks the document of a patch, as far as that is possible without the sources.

Its digests are checked when it is opened and read, but anyone who rewrites a patch can recompute them. Here the
document is compared with the parameters in it, by the checks that `hsa verify` applies to the record of an output.
"""

from __future__ import annotations

from collections.abc import Iterator

from hsa.errors import HsaError, PatchError, shown
from hsa.option_names import as_keys, spelled
from hsa.outputs.patch_format import patch_obstacles
from hsa.outputs.patch_reader import Patch
from hsa.outputs.record_checks import setting_faults, settings_of_record, target_faults, target_faults_without_weights
from hsa.sources.checkpoint import Checkpoint


def patch_faults(patch: Patch, primary: Checkpoint | None = None) -> Iterator[str]:
    """One line for each statement that hsa never writes in a patch, the most telling first; nothing for a sound patch.

    With `primary`, names, shapes, dtypes, heads and layers are compared with those of `primary`. Rows are not read.

    Example:
        >>> with ExitStack() as stack:  # doctest: +SKIP
        ...     list(patch_faults(open_patch("sweep/encoder-qkv_k0.6_lambda0.3_alpha0.2.safetensors", Tally(), stack)))
        []
    """
    contents, record = patch.contents, patch.record
    yield from setting_faults(record)
    try:
        settings = settings_of_record(record)
    except HsaError:  # setting_faults above has reported it
        return
    with spelled(as_keys(record.parameters)):
        kind = record.sources[record.anchor].kind
        reasons = list(patch_obstacles(record.method, settings, record.anchor, kind))
    for why in reasons:
        yield f"its parameters are those of no patch: {why}"
    if record.parameters.get("backend") != "cpu":
        yield f"its backend is {shown(record.parameters.get('backend'))}; patches are made on the CPU, expected 'cpu'"
    yield from target_faults_without_weights(record) if primary is None else target_faults(record, primary)
    stacks = {target.place.stack for target in contents.targets if target.place is not None} | {"all"}
    if contents.distances.keys() != stacks:
        yield f"its distances are of {shown(sorted(contents.distances))}, expected {', '.join(sorted(stacks))}"


def require_sound(patch: Patch, primary: Checkpoint | None = None) -> None:
    """Raise PatchError with the first of `patch_faults`, if there is any."""
    fault = next(patch_faults(patch, primary), None)
    if fault is not None:
        raise PatchError(f"patch {patch.source.path}: {fault}; hsa wrote no such patch, make it again")
