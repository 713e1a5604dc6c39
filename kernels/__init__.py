"""GPU code of hsa, installed as `hsa.kernels`; never `import kernels`.

Hugging Face has a package named `kernels`, and transformers looks up its version by that name. With a checkout's root
on `sys.path`, it finds this folder instead. Some releases raise if the module found has no version, hence the version
below.
"""

from __future__ import annotations

__version__ = "0.1.0"
