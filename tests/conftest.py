"""One test text for both worlds: on a CPU the kernels are interpreted, on a GPU they are compiled."""

import gc
import os

import torch

CUDA = torch.cuda.is_available()
if os.environ.get("GKERNELS_REQUIRE_GPU") and not CUDA:
    raise RuntimeError("GKERNELS_REQUIRE_GPU is set, but torch sees no CUDA device: the GPU tests would prove nothing")
if not CUDA:
    from gkernels import interpret
    interpret.enable()                                   # before any test imports a kernel
torch.use_deterministic_algorithms(True, warn_only=CUDA)  # torch.empty returns NaN, so what a kernel left unwritten shows
torch.set_num_threads(1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

COMMON = dict(deadline=None, database=None, derandomize=True, print_blob=True,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
settings.register_profile("cpu", max_examples=20, **COMMON)
settings.register_profile("gpu", max_examples=60, **COMMON)
settings.register_profile("unshrunk", max_examples=20, phases=[Phase.generate], **COMMON)   # a failure at once, not a small one
settings.register_profile("long", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gpu" if CUDA else "cpu"))


@pytest.fixture
def device():
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def cuda(monkeypatch):
    """A driver that stands in for CUDA's, on a CPU."""
    from tests.fake_cuda import FakeCuda
    gc.freeze()                                           # a collection of all that the tests have imported takes 0.1 s, and a capture makes one
    yield FakeCuda().install(monkeypatch)
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """Tests marked gpu are left out on a CPU by their marker, and counted as such; GKERNELS_REQUIRE_GPU turns that into an error."""
    if not CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make gpu` runs it"))
