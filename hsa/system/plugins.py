"""The modules in which registries look for entries: those of a package, and the Python files named in HSA_PLUGINS."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from functools import cache
from hashlib import sha256
from types import ModuleType

from hsa.errors import RequestError

VARIABLE = "HSA_PLUGINS"
"""The environment variable with the paths of plugin files, separated by `os.pathsep`."""


def modules_of(package: str) -> tuple[ModuleType, ...]:
    """Return the modules of a package of hsa, sorted by name, then the plugin files in the order of `HSA_PLUGINS`.

    Raises RequestError for a plugin file that cannot be loaded.
    """
    paths = [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    return (*_modules_in(package), *(_load(os.path.realpath(os.path.expanduser(path))) for path in paths))


@cache
def _modules_in(package: str) -> tuple[ModuleType, ...]:
    names = sorted(entry.name for entry in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return tuple(importlib.import_module(f"{package}.{name}") for name in names)


@cache
def _load(path: str) -> ModuleType:
    """Load a Python file as a module. It runs only once per process."""
    digest = sha256(os.fsencode(path)).hexdigest()[:16]  # the same in every process, so that its objects can be pickled
    name = f"_hsa_plugin_{os.path.splitext(os.path.basename(path))[0]}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{VARIABLE}: {path} is no Python file; give files that end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything, or call `exit()`
        del sys.modules[name]
        text = " ".join(str(error).split())
        raise RequestError(
            f"{VARIABLE}: {path} cannot be loaded ({type(error).__name__}: {text:.300}); correct the file, or take it "
            f"out of {VARIABLE}"
        ) from error
    return module
