"""Host-side argument checks. Every message names the op, the argument, what came, what was expected and how to mend it."""

from __future__ import annotations

import torch
import triton

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


HAS_GLUON = triton.__version__.startswith("3.6.")   # an experiment of Triton's, that other versions may change: they do without those kernels
INTERPRETED = triton.knobs.runtime.interpret       # as it was when the kernels were decorated; a later change does not reach them


def can_run(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device: the current GPU, or the CPU where kernels are interpreted."""
    return INTERPRETED if device.type == "cpu" else device.type != "cuda" or device.index == torch.cuda.current_device()


def capability() -> int:
    """Of the GPU that kernels are compiled for, 90 for Hopper; 0 where that is none of NVIDIA's."""
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    return target.arch if target and target.backend == "cuda" else 0


def registers(most: int) -> dict[str, int]:
    """Launch options for a kernel whose threads may have `most` registers each: left to itself, ptxas spills where that admits one program more to a
    multiprocessor, whether or not it is launched. AMD's compiler knows no such option, and the interpreter needs none."""
    return {"maxnreg": most} if capability() else {}


def require(good: bool, op: str, argument: str, got: object, expected: str, error: type[Exception] = ValueError) -> None:
    if not good:
        raise error(f"gkernels.{op}: {argument}: got {got}, expected {expected}")


def tensor(op: str, name: str, t: torch.Tensor, shape: tuple, dtypes: tuple, device: torch.device | None = None,
           dense: int = 1, aligned: bool = True, writes: bool = False) -> None:
    """Checks a tensor that a kernel will read or write. `shape` holds ints, or None where any size will do; the innermost `dense`
    dimensions must be contiguous; `aligned` asks for a base address that divides by 16, which keeps loads vectors;
    `writes` refuses rows that lie on each other."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"gkernels.{op}: {name}: got {type(t).__name__}, expected a torch.Tensor")
    if t.dim() != len(shape) or any(want is not None and have != want for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"gkernels.{op}: {name}: got shape {list(t.shape)}, expected [{', '.join('any' if s is None else str(s) for s in shape)}]")
    if t.dtype not in dtypes:
        raise TypeError(f"gkernels.{op}: {name}: got {t.dtype}, expected {' or '.join(str(d) for d in dtypes)}; convert with .to()")
    if device is not None and t.device != device:
        raise ValueError(f"gkernels.{op}: {name}: got device {t.device}, expected {device} like the other arguments; move it with .to()")
    step = 1
    for dim in range(t.dim() - 1, t.dim() - 1 - dense, -1):
        if t.shape[dim] > 1 and t.stride(dim) != step:
            raise ValueError(f"gkernels.{op}: {name}: got strides {list(t.stride())}, expected the last {dense} dimension(s) contiguous; "
                             "call .contiguous()")
        step *= t.shape[dim]
    if aligned and t.data_ptr() % 16:
        raise ValueError(f"gkernels.{op}: {name}: got an address that is not a multiple of 16 bytes, expected an aligned one; call .clone()")
    if writes and any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
        raise ValueError(f"gkernels.{op}: {name}: got strides {list(t.stride())}, expected rows that do not overlap; call .contiguous()")
    if not can_run(t.device):
        raise ValueError(f"gkernels.{op}: {name}: got a CPU tensor, expected one on a GPU, or kernels that are interpreted; move it with "
                         ".to('cuda'), or call gkernels.interpret.enable() before a kernel is imported" if t.device.type == "cpu" else
                         f"gkernels.{op}: {name}: got a tensor on {t.device}, expected one on the current device, where Triton launches; call "
                         f"torch.cuda.set_device({t.device.index})")


def counter(op: str, name: str, t: torch.Tensor | None, device: torch.device) -> None:
    """Checks an optional int32 [1] tensor, such as `num_tokens`."""
    if t is not None:
        tensor(op, name, t, (1,), (torch.int32,), device, aligned=False)
