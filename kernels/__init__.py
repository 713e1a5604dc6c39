"""GPU code of hsa, installed as `hsa.kernels`; never `import kernels`.

Hugging Face has a package named `kernels`, and transformers looks its version up by that name. With a
checkout's root on `sys.path` it finds this folder instead, and some releases raise when the module found has
no version: so one stands here.
"""

from __future__ import annotations

__version__ = "0.1.0"
