"""Plain-PyTorch twins of the kernels: same names and signatures, no `out`, no configuration. They import torch and einops only."""
