"""What is precompiled for a GPU is what an engine launches there, key by key; and then it compiles nothing. Child processes do both, on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import triton
from triton.runtime.cache import FileCacheManager

from gkernels.precompile import Elsewhere, in_workers, target_of
from tests.precompile_child import CONFIG, CPU_MULTIPROCESSORS

pytestmark = pytest.mark.aot


def run(*arguments, cache=None, interpreted=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], env=environment, capture_output=True, text=True)


def child(*arguments, **options):
    done = run("tests.precompile_child", *arguments, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def keys():
    return child("keys")


def check_same(planned, served):
    missing, needless = ({a[key] for key in a.keys() - b.keys()} for a, b in ((served, planned), (planned, served)))
    assert not missing and not needless, f"the engine launches others: {sorted(missing)}; nobody launches {sorted(needless)}"


def test_the_engine_launches_what_was_precompiled(keys):
    """Hashes of source, signature, constants, alignment, options, target and compiler: an engine's over chunks and decodes of every bucket, of which
    the largest takes single ops and the others fused nodes."""
    check_same(keys["planned"], keys["served"])
    assert {"_rmsnorm_kernel", "_norm_qkv_kernel"} <= set(keys["planned"].values()) and len(set(keys["planned"].values())) >= 8


def test_an_engine_with_quantised_weights_launches_what_was_precompiled(keys):
    check_same(**keys["quantised"])
    with pytest.raises(AssertionError, match=r"the engine launches others: .*'_norm_gate_up_kernel'"):
        check_same(keys["planned"], keys["quantised"]["served"])


@pytest.mark.parametrize("other, kernel", [("dtype", "_linear_kernel"), ("arch", "_embedding_kernel"), ("multiprocessors", "_attention_kernel"),
                                           ("page size", "_schedule_kernel"), ("buckets", "_linear_kernel")])
def test_control_what_was_precompiled_otherwise_is_seen(keys, other, kernel):
    with pytest.raises(AssertionError, match=rf"the engine launches others: \[.*'{kernel}'"):
        check_same(keys["others"][other], keys["served"])


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The cache after the command, what it said, and what it said the second time."""
    folder = tmp_path_factory.mktemp("precompiled")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    command = ("gkernels", "precompile", "--config", folder / "config.json", "--arch", "90", "--dtype", "bfloat16", "--max-tokens", 2,
               "--max-requests", 2, "--multiprocessors", CPU_MULTIPROCESSORS, "--workers", 2)
    return folder / "cache", *(run(*command, cache=folder / "cache") for _ in range(2))


def test_the_command_says_what_it_did(cached):
    folder, first, second = cached
    assert first.returncode == 0, first.stderr
    account = rf"(\d+) binaries for sm_90 with 4 multiprocessors: \1 compiled in \d+\.\d s, 0 in the cache before; {folder} must stand at the same "
    assert (found := re.match(account, first.stdout)), first.stdout
    assert second.stdout.startswith(f"{found[1]} binaries for sm_90 with 4 multiprocessors: 0 compiled in ")
    assert f"{found[1]} in the cache before" in second.stdout


def test_then_nothing_is_compiled(cached):
    """An engine through Triton's own launch path, in another process."""
    served = child("serve", cache=cached[0])
    assert served["launched"] > 50 and not served["compiled"] and len(served["found"]) == int(cached[1].stdout.split()[0])


def test_control_what_the_cache_lacks_is_compiled(cached):
    scale = [index.parent for index in cached[0].glob("*/__grp___scale_kernel.json")]
    for entry in scale:
        shutil.rmtree(entry)
    assert child("serve", cache=cached[0])["compiled"] == ["_scale_kernel"] * len(scale) != []


def test_a_cache_that_was_moved_is_empty(cached, tmp_path, monkeypatch):
    """As the account says: Triton's index holds absolute paths."""
    index = next(cached[0].glob("*/__grp__*.json"))
    find = lambda: FileCacheManager(index.parent.name).get_group(index.name.removeprefix("__grp__"))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cached[0]))
    assert find()
    cached[0].rename(tmp_path / "moved")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "moved"))
    assert not find()
    (tmp_path / "moved").rename(cached[0])


@pytest.mark.parametrize("arch, target", [("90", ("cuda", 90, 32)), ("sm_120", ("cuda", 120, 32)), ("gfx942", ("hip", "gfx942", 64)),
                                          ("gfx1100", ("hip", "gfx1100", 32))])
def test_targets(arch, target):
    got = target_of(arch)
    assert (got.backend, got.arch, got.warp_size) == target


@pytest.mark.parametrize("arch", ["90a", "9.0", "sm90a", "hopper", ""])
def test_bad_targets_are_named(arch):
    with pytest.raises(ValueError, match=f"precompile: arch: got {arch!r}, expected a compute capability without its dot, such as 90"):
        target_of(arch)


@pytest.mark.parametrize("changes, words", [
    ({"--arch": "90a"}, "precompile: arch: got '90a', expected a compute capability"),
    ({"--arch": "75"}, "precompile: multiprocessors: got none for 75, expected the number that the GPU has, which is known here for 80, 89, 90"),
    ({"--max-tokens": 4}, "precompile: max_tokens: got 4, expected at least max_requests = 32"),
    ({"--config": "nowhere.json"}, "nowhere.json: no such file"),
])
def test_mistakes_are_told_in_a_line(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = {"--config": tmp_path / "config.json", "--arch": "90"} | changes
    done = run("gkernels", "precompile", *(word for pair in options.items() for word in pair))
    assert done.returncode == 2 and done.stderr.startswith("gkernels: ") and words in done.stderr and done.stderr.count("\n") == 1


def test_an_interpreting_process_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = run("gkernels", "precompile", "--config", tmp_path, "--arch", "90", interpreted=True)
    assert done.returncode == 2 and "got a process that interprets kernels, expected one that compiles them; unset it" in done.stderr


def test_tensors_elsewhere_have_no_memory():
    """They say that they lie on the GPU, wherever their device was named; tensors of the CPU stay what they are."""
    with Elsewhere():
        made = [torch.empty(1 << 40, device="cuda"), torch.zeros(3, 4, device=torch.device("cuda")), torch.ones(4).to(torch.device("cuda", 0))]
        made += [torch.empty_like(made[1]), made[1][1:], made[1].new_empty(5)]
        assert all(t.device == torch.device("cuda", 0) and t.is_cuda for t in made)
        host = torch.zeros(3, pin_memory=True)
        assert host.device.type == "cpu" and not host.is_cuda and host.tolist() == [0, 0, 0]
    assert all(t.device.type == "meta" for t in made) and made[4].data_ptr() == 16


def work(job):
    if job == "dies":
        os._exit(1)
    if job == "raises":
        raise KeyError(job)
    time.sleep(0.01 * (job == "slow"))
    return job.upper()


def test_workers_answer_in_order_and_by_name():
    assert list(in_workers(work, ["slow", "quick", "quick"], 2)) == ["SLOW", "QUICK", "QUICK"]
    first, second = in_workers(work, ["raises", "quick"], 1)
    assert isinstance(first, RuntimeError) and str(first) == "KeyError: 'raises'" and second == "QUICK"
    (dead,) = in_workers(work, ["dies"], 1)
    assert str(dead) == "the compiler ended a worker process"
