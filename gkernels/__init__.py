"""Graph-safe Triton kernels for LLM inference.

`import gkernels` loads neither torch nor triton; each name below is loaded at its first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {"ops": "gkernels.ops", "kernels": "gkernels.kernels", "graph": "gkernels.graph", "model": "gkernels.model",
         "interpret": "gkernels.interpret"}


def __getattr__(name):
    if name in _LAZY:
        return import_module(_LAZY[name])
    raise AttributeError(f"module 'gkernels' has no attribute {name!r}; it has {', '.join(_LAZY)}")
