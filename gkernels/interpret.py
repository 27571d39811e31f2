"""Makes Triton's CPU interpreter compute what the GPU computes.

Triton 3.6 interprets kernels with numpy when `TRITON_INTERPRET=1` is set before a kernel is decorated. Three of its gaps matter here:
`range()` over a loaded integer fails with numpy >= 2.4, bf16 arithmetic and `tl.dot` work on raw bit patterns, and conversions to bf16
truncate. `repair()` mends the first, makes bf16 dots and conversions exact, and turns bf16 arithmetic into an error that names the mend.
It also sums dots in float64: numpy's float32 product of one row changes with the row's place in the matrix, which the GPU's does not.
"""

from __future__ import annotations

import os
import sys

REPAIRED_VERSIONS = ("3.6.",)   # the private names below were read in these releases only


def enable() -> None:
    """Switches the interpreter on for every kernel that is imported from now on, and repairs it. RuntimeError where it comes too late."""
    check = sys.modules.get("gkernels.kernels._check")
    if check is not None and not check.INTERPRETED:
        raise RuntimeError("gkernels.interpret.enable: kernels were imported before and stay compiled; call it first")
    language = sys.modules.get("triton.language")
    if language is not None and type(language.sum).__name__ == "JITFunction":
        raise RuntimeError("gkernels.interpret.enable: triton was imported before, and its own functions, tl.sum among them, stay compiled; call it "
                           "first, or set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    repair()


def repair() -> None:
    """Patches Triton's interpreter; safe to call twice. Raises RuntimeError on a Triton release that it does not know."""
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not triton.__version__.startswith(REPAIRED_VERSIONS):
        raise RuntimeError(f"gkernels.interpret knows the interpreter of Triton {', '.join(v + 'x' for v in REPAIRED_VERSIONS)}, got "
                           f"{triton.__version__}: install triton==3.6.0 to run kernels on a CPU")
    if getattr(interpreter, "_gkernels_repaired", False):
        return
    torch_types = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float64: torch.float64,
                   tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    bits = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}

    def convert_float(data, source, target, rounding_mode):
        raw = torch.from_numpy(np.array(data, order="C", copy=True).view(f"uint{source.primitive_bitwidth}"))
        wide = raw.view(torch_types[source])
        if target in (tl.float8e4nv, tl.float8e5):                      # the GPU saturates where torch overflows
            limit = torch.finfo(torch_types[target]).max
            wide = wide.clamp(-limit, limit)
        return wide.to(torch_types[target]).view(bits[target.primitive_bitwidth]).numpy().reshape(np.shape(data))

    def widened(handle):
        kind = handle.dtype.scalar
        if kind == tl.bfloat16 or (kind.primitive_bitwidth == 8 and kind.is_floating()):
            return convert_float(handle.data, kind, tl.float64, None).view(np.float64)
        return handle.data.astype(np.float64) if kind.is_floating() else handle.data.astype(np.int64)

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle((np.matmul(widened(a), widened(b)) + d.data).astype(d.data.dtype), d.dtype.scalar)

    def refuse_bf16(name):
        plain = getattr(interpreter.InterpreterBuilder, name)

        def op(builder, *args):
            if any(arg.dtype.scalar == tl.bfloat16 for arg in args):
                raise TypeError(f"{name} on bfloat16 is wrong in the interpreter: cast to tl.float32 right after tl.load")
            return plain(builder, *args)
        return op

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    patched: set[frozenset[int]] = set()           # the language modules patched since the running launch began
    launch = interpreter.GridExecutor.__call__

    def launch_afresh(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    def call_helper(helper, *args, **kwargs):
        """A @triton.jit function inside a kernel. Patching the language at every such call costs 0.6 ms, a sixth of a model's step."""
        languages = frozenset(id(value) for value in helper.fn.__globals__.values() if value is tl or value is tl.core)
        if languages not in patched:
            interpreter._patch_lang(helper.fn)
            patched.add(languages)
        return helper.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call_helper
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor_and_index
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fma", "create_exp", "create_exp2", "create_log"):
        setattr(interpreter.InterpreterBuilder, name, refuse_bf16(name))
    interpreter._gkernels_repaired = True
