"""CUDA graphs of whole steps: buckets of token counts, static buffers with pad values, runners that capture and replay a step whole, many
times over or cut at the ops that no graph may hold, and a freeze that no compilation passes.

This package knows tensors and callables; it knows no kernel and no model.
"""

from .buckets import Buckets
from .buffers import Field, StaticBuffers
from .capture import GraphRunner
from .choosing import ChoosingRunner
from .frozen import CompiledAfterWarmUp, frozen
from .loop import Burst, Loop
from .piecewise import PiecewiseRunner
from .segments import eager

__all__ = ["Buckets", "Burst", "ChoosingRunner", "CompiledAfterWarmUp", "Field", "GraphRunner", "Loop", "PiecewiseRunner", "StaticBuffers",
           "eager", "frozen"]
