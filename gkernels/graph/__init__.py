"""CUDA graphs of whole steps: buckets of token counts, static buffers with pad values, and the runner that captures and replays.

This package knows tensors and callables; it knows no kernel and no model.
"""

from .buckets import Buckets
from .buffers import Field, StaticBuffers
from .capture import GraphRunner

__all__ = ["Buckets", "Field", "GraphRunner", "StaticBuffers"]
