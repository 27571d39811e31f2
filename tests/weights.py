"""Weights of every kind that products take, with random contents, beside the numbers that they stand for."""

from dataclasses import dataclass

import torch

from gkernels.kernels._quantized import Quantized
from reference import linear_quantized as twin
from tests.strategies import binaries, randn

FP8 = torch.float8_e4m3fn
FORMATS = ["fp8 row", "int4 128", "fp8 block", "int4 32", "int4 256", "int4 all"]
KINDS = ["plain", *FORMATS]
formats, kinds = binaries(FORMATS, 4), binaries(KINDS, 5)


@dataclass
class Weight:
    """`given` is what an op takes, `values` float64 [N, K] what it stands for."""

    kind: str
    given: torch.Tensor | Quantized
    values: torch.Tensor

    @classmethod
    def of(cls, kind, given, K):
        """The weight that `given` is; K columns."""
        if isinstance(given, torch.Tensor):
            return cls(kind, given, given.double())
        return cls(kind, given, twin.fp8_values(*given) if kind.startswith("fp8") else twin.int4_values(*given, K))

    @property
    def rows(self):
        return len(self.values)

    def rolled(self):
        """Another weight of this kind: each row, block or group has another's scale, each row of a plain one is another."""
        if isinstance(self.given, torch.Tensor):
            return self.given.roll(1, 0)
        weight, scale = self.given
        return Quantized(weight, scale.roll(1, 0 if len(scale) > 1 else scale.dim() - 1))


def draw(seed, kind, N, K, dtype, device, size=1.0, integers=False):
    """A weight [N, K] of a kind, "int4 all" where the group does not divide K, with numbers of about `size`, or with small integers. dtype: of a
    plain one. Columns of int4 past K hold junk."""
    generator, (name, _, detail) = torch.Generator().manual_seed(seed), kind.partition(" ")
    weight = randn(seed, N, K)
    weight = weight.mul(2).round().clamp(-4, 4) if integers else weight
    if name == "plain":
        return Weight.of(kind, (weight if integers else weight * size).to(device, dtype), K)
    if name == "fp8":
        shape = (N,) if detail == "row" else (-(-N // 128), -(-K // 128))
        return Weight.of(kind, Quantized(weight.to(device, FP8), scales(generator, shape, integers, size).to(device)), K)
    words = torch.randint(-2**31, 2**31, (N, -(-K // 256) * 32), generator=generator).int()
    shape = 1 if detail == "all" or K % int(detail) else K // int(detail), N
    zeros = torch.randint(0, 17, shape, generator=generator, dtype=torch.int32)
    constants = scales(generator, shape, integers, size / 6.5).half().float().view(torch.int32) | zeros
    return Weight.of(kind, Quantized(words.to(device), constants.to(device)), K)


def scales(generator, shape, integers, size):
    return torch.randint(1, 4, shape, generator=generator).float() if integers else torch.randn(shape, generator=generator) * size
