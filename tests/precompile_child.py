"""Serves a tiny model, for tests/test_precompile.py; run it without TRITON_INTERPRET.

python -m tests.precompile_child keys      hashes of what is precompiled and of what an engine then launches on this machine's GPU, as JSON.
                                           Without one, tensors of the CPU stand for the GPU's, and a driver for its driver
python -m tests.precompile_child serve     the same engine's steps through Triton's own launch path, on a GPU that is not there: binaries that
                                           were found in the cache and that were compiled, as JSON
"""

import json
import sys
from contextlib import nullcontext
from unittest.mock import patch

import torch
import triton

from gkernels import precompile
from gkernels.graph import Buckets
from gkernels.kernels import _check
from gkernels.model.config import LlamaConfig
from gkernels.model.engine import Engine, Sampling
from gkernels.model.llama import Llama
from gkernels.model.load import empty_projections, random_weights
from tests.frozen_kernels import Driver
from tests.strategies_model import tiny_config

CONFIG = tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True)
CUDA = torch.cuda.is_available()
ARCH = "{}{}".format(*torch.cuda.get_device_capability()) if CUDA else "90"
CPU_MULTIPROCESSORS = 4                  # what attention takes a CPU for
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else CPU_MULTIPROCESSORS
PROMPTS = {80: [[1] * n for n in (80, 57, 41, 33, 27, 20, 12, 7, 3, 2, 1)], 2: [[1], [1, 1]]}


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}


def engine(max_tokens, max_requests, device="cpu", changes=None):
    config = LlamaConfig.from_dict(CONFIG | {"max_position_embeddings": 128} | (changes or {}))
    weights = random_weights(config, device, torch.bfloat16)
    empty_projections(weights, config)
    model = Llama.build(config, weights, 128)
    return Engine(model, max_tokens, max_requests, 100, capture=False)


def steps(engine):
    """Prompts alone, one that fills each bucket, then all at once with decodes among them. What comes out is junk: nothing runs."""
    prompts = PROMPTS[engine.step_fn.max_tokens]
    for prompt in prompts:
        i = engine.add(prompt, Sampling(max_tokens=2, ignore_eos=True))
        while engine.busy:
            engine.step()
        engine.take(i)
    for prompt in prompts:
        engine.add(prompt, Sampling(max_tokens=2, ignore_eos=True))
    while engine.busy:
        engine.step()


def hashes(launches):
    return {launch.hash: launch.kernel.__name__ for launch in launches}


def planned(dtype=torch.bfloat16, arch=ARCH, multiprocessors=MULTIPROCESSORS, max_tokens=80, max_requests=3, changes=None, **options):
    config = LlamaConfig.from_dict(CONFIG | (changes or {}))
    return hashes(precompile.step_launches(config, dtype, precompile.target_of(arch), multiprocessors, max_tokens, max_requests, **options))


def keys():
    with nullcontext() if CUDA else precompile.compiling_for(precompile.target_of(ARCH)):
        served, quantised = (hashes(precompile.launches_of(steps, engine(80, 3, "cuda" if CUDA else "cpu", changes)))
                             for changes in (None, QUANTISED))
    others = {"dtype": planned(torch.float16), "arch": planned(arch="80"), "multiprocessors": planned(multiprocessors=MULTIPROCESSORS + 1),
              "page size": planned(page_size=8), "buckets": planned(buckets=Buckets([64, 80]))}
    return {"planned": planned(), "served": served, "others": others, "quantised": {"planned": planned(changes=QUANTISED), "served": quantised}}


def serve():
    hits = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: hits.append((src.name, cache_hit))
    triton.runtime.driver.set_active(Driver(precompile.target_of("90")))
    with patch.object(_check, "can_run", lambda device: True):
        steps(engine(2, 2))
    return {"launched": len(Driver.launched), "found": [name for name, hit in hits if hit], "compiled": [name for name, hit in hits if not hit]}


if __name__ == "__main__":
    print(json.dumps({"keys": keys, "serve": serve}[sys.argv[1]]()))
