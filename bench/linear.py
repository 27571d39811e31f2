"""linear at every product of Llama 3.2 1B, Llama 3.1 8B and an eighth of Llama 3.1 70B, against cuBLAS, which torch.mm calls, and the floor; then
norm_linear and linear_residual, which share the norm between them, against torch's operations, and against this library's own unfused ones."""

import torch

from bench.harness import bench, floor
from gkernels.kernels import linear, rmsnorm

SHAPES = {"1B qkv": (3072, 2048), "1B o": (2048, 2048), "1B gate_up": (16384, 2048), "1B down": (2048, 8192), "1B logits": (128256, 2048),
          "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336), "8B logits": (128256, 4096),
          "70B/8 qkv": (1280, 8192), "70B/8 o": (8192, 1024), "70B/8 gate_up": (7168, 8192), "70B/8 down": (8192, 3584)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FUSED = {"norm": ["8B logits"], "residual": ["1B o", "1B down", "8B o", "8B down"]}


def cases():
    """(case, bytes moved, floating-point operations, {provider: make})"""
    for name, (N, K) in SHAPES.items():
        dtype = torch.float32 if "logits" in name else torch.bfloat16
        for T in TOKENS:
            moved = N * K * 2 + T * K * 2 + T * N * dtype.itemsize                    # weights and x in, out written once
            yield f"{N}x{K} M{T}", moved, 2 * T * N * K, {which: provider(which, T, N, K, dtype) for which in ("gkernels", "cublas")}
    for kind, names in FUSED.items():
        for name in names:
            (N, K), dtype = SHAPES[name], torch.float32 if kind == "norm" else torch.bfloat16
            for T in (1, 16, 64):
                moved = N * K * 2 + T * K * 2 + T * N * (dtype.itemsize if kind == "norm" else 6)      # the residual is read and written
                makes = {which: fused(which, kind, T, N, K, dtype) for which in ("gkernels", "unfused", "torch")}
                yield f"{kind} {name} {T} x {N} x {K}", moved, 2 * T * N * K, makes


def provider(name, T, N, K, dtype):
    def make(i):
        x, weight = (torch.randn(rows, K, dtype=torch.bfloat16, device="cuda") for rows in (T, N))
        out, workspace = torch.empty(T, N, dtype=dtype, device="cuda"), linear.Workspace.allocate("cuda")
        if name == "gkernels":
            return lambda: linear.linear_out(x, weight, out, workspace=workspace, ready=True)
        wider = {"out_dtype": dtype} if dtype != x.dtype else {}
        return lambda: torch.mm(x, weight.T, out=out, **wider)
    return make


def fused(name, kind, T, N, K, dtype):
    def make(i):
        x, weight = (torch.randn(rows, K, dtype=torch.bfloat16, device="cuda") for rows in (T, N))
        norm, next_norm = (torch.ones(width, dtype=torch.bfloat16, device="cuda") for width in (K, N))
        out, added = torch.zeros(2, T, N, dtype=dtype, device="cuda")
        workspace, normed = linear.Workspace.allocate("cuda"), torch.empty_like(x)
        scaled, left = (linear.Scaled.empty(T, width, torch.bfloat16, "cuda", splits=True) for width in (K, N))
        wider = {"out_dtype": dtype} if dtype != x.dtype else {}

        def norm_pair():
            if name == "torch":
                return torch.mm(torch.nn.functional.rms_norm(x, (K,), norm, 1e-5), weight.T, out=out, **wider)
            rmsnorm.rmsnorm_out(x, norm, 1e-5, normed)
            linear.linear_out(normed, weight, out)

        def residual_pair():
            if name == "torch":
                torch.addmm(out, x, weight.T, out=out)
                return torch.nn.functional.rms_norm(out, (N,), next_norm, 1e-5)
            linear.linear_out(x, weight, added)
            rmsnorm.add_rmsnorm_out(added, out, next_norm, 1e-5, left.x)

        if name != "gkernels":
            return norm_pair if kind == "norm" else residual_pair
        if kind == "norm":
            rmsnorm.scale(x, norm, scaled)
            return lambda: linear.norm_linear_out(scaled, weight, 1e-5, out)
        return lambda: linear.linear_residual(x, weight, out, workspace=workspace, norm=next_norm, scaled=left)
    return make


def main():
    for case, moved, flops, makes in cases():
        for name, make in makes.items():
            bench("linear", case, name, make, bytes=moved, flops=flops)
        floor("linear", case, moved, flops)
