"""The house rules that can be read from the text: who imports whom, what a kernel room never calls, and that every room is complete."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = sys.stdlib_module_names
MODEL = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "gkernels.ops", "gkernels.graph", "gkernels.model",
         "gkernels.progress"}
ALLOWED = {   # folder: what its files may import besides the standard library; the longest matching folder counts
    "reference": {"torch", "einops", "reference"},
    "gkernels/__init__.py": set(),
    "gkernels/interpret.py": {"numpy", "torch", "triton"},
    "gkernels/kernels": {"torch", "triton", "gkernels.kernels"},
    "gkernels/ops.py": {"torch", "gkernels.kernels"},
    "gkernels/graph": {"torch", "numpy", "cuda", "triton", "gkernels.graph", "gkernels.progress"},
    "gkernels/model": MODEL,
    "gkernels/integrations": MODEL | {"transformers", "vllm", "flash_attn", "gkernels.integrations", "gkernels.kernels._check"},
    "gkernels/pytest_plugin.py": {"pytest", "gkernels.graph"},
    "gkernels": {"torch", "triton", "tqdm", "numpy", "gkernels"},
}
SYNCS = {"item", "tolist", "cpu", "nonzero", "numpy", "synchronize"}
ALLOCATORS = {"empty_like", "zeros_like", "ones_like", "full_like", "empty_strided", "new_empty", "new_zeros", "new_full", "clone",
              "contiguous"} | {f"torch.{name}" for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "cat", "stack")}


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree, path):
    """Every module that a file imports, wherever the statement stands, with relative names resolved."""
    package = name_of(path).removesuffix(".py").removesuffix("/__init__").split("/")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) + 1 - node.level] + ([node.module] if node.module else [])) if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def strangers(tree, path):
    """The imports that a file's folder does not allow."""
    folder = max((f for f in ALLOWED if name_of(path) == f or name_of(path).startswith(f + "/")), key=len)
    allowed = tuple(root + "." for root in STDLIB | ALLOWED[folder])
    return [module for module in imports(tree, path) if not f"{module}.".startswith(allowed)]


def calls(tree):
    """(line, name) of every call: the last part of a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def syncs(tree):
    """Calls that read a tensor on the host."""
    return [found for found in calls(tree) if found[1] in SYNCS]


def autotuned(tree):
    return [function.name for function in functions(tree) if "autotune" in " ".join(map(ast.unparse, function.decorator_list))]


def allocations(tree):
    """Tensors made in a function named *_out or in the _launch that it shares."""
    return [(function.name, node.lineno, ast.unparse(node.func)) for function in functions(tree)
            if function.name.endswith("_out") or function.name.startswith("_launch") for node in ast.walk(function)
            if isinstance(node, ast.Call) and ALLOCATORS & {ast.unparse(node.func), ast.unparse(node.func).split(".")[-1]}]


def tolerances(tree):
    """Numbers given as rtol or atol, and allclose, which has its own."""
    literals = [(node.value.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ("rtol", "atol")]
    return literals + [found for found in calls(tree) if found[1] in ("allclose", "isclose", "approx")]


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def parse(path):
    return ast.parse(path.read_text(), name_of(path))


@pytest.mark.parametrize("path", sources("gkernels", "reference"), ids=name_of)
def test_imports_follow_the_house(path):
    assert not strangers(parse(path), path)


@pytest.mark.parametrize("path", sources("gkernels/kernels"), ids=name_of)
def test_rooms_neither_sync_nor_tune_nor_allocate(path):
    tree = parse(path)
    assert not syncs(tree) and not autotuned(tree) and not allocations(tree)


@pytest.mark.parametrize("path", [p for p in sources("tests", "bench") if p.name != "close.py"], ids=name_of)
def test_tolerances_live_in_close(path):
    assert not tolerances(parse(path))


def rooms():
    return [path.stem for path in (ROOT / "gkernels" / "kernels").glob("*.py") if not path.stem.startswith("_")]


@pytest.mark.parametrize("place", ["reference/{}.py", "tests/test_{}.py", "bench/{}.py"])
def test_every_room_has_its_files(place):
    missing = [place.format(room) for room in rooms() if not (ROOT / place.format(room)).exists()]
    assert not missing, f"missing: {', '.join(missing)}"


def test_every_room_has_its_calls():
    from tests.calls import ROOMS
    assert sorted(rooms()) == sorted(ROOMS)


def test_twins_share_names_and_parameters():
    """Every public function of a twin that its room has too takes the room's parameters in the room's order, but for `out` and for
    what only a launch has."""
    parameters = lambda function: [a.arg for a in function.args.args + function.args.kwonlyargs]
    for room in rooms():
        if not (ROOT / f"reference/{room}.py").exists():
            continue
        own = {f.name: parameters(f) for f in parse(ROOT / f"gkernels/kernels/{room}.py").body if isinstance(f, ast.FunctionDef)}
        twin = {f.name: parameters(f) for f in parse(ROOT / f"reference/{room}.py").body if isinstance(f, ast.FunctionDef)}
        for op in (name.removesuffix("_out") for name in own if name.endswith("_out") and name.removesuffix("_out") in own):
            assert op in twin, f"reference/{room}.py has no {op}"
            shared = [p for p in own[op] if p not in ("workspace", "programs", "invariant", "ready")]
            assert twin[op] == shared, f"{room}: the twin of {op} takes others"


def test_importing_gkernels_loads_nothing():
    code = "import gkernels, sys; print([m for m in ('torch', 'triton', 'numpy', 'transformers', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("text, where, found", [
    ("import tests.close", "gkernels/kernels/new.py", "tests.close"),
    ("def f():\n    from bench import harness", "gkernels/model/new.py", "bench.harness"),
    ("from ..model import cache", "gkernels/kernels/new.py", "gkernels.model.cache"),
    ("from .. import kernels", "gkernels/graph/new.py", "gkernels.kernels"),
    ("from ..kernels import rmsnorm", "gkernels/model/new.py", "gkernels.kernels.rmsnorm"),
    ("import triton", "reference/new.py", "triton"),
    ("import torch", "gkernels/__init__.py", "torch"),
])
def test_a_stranger_is_seen(text, where, found):
    assert strangers(ast.parse(text), ROOT / where) == [found]


@pytest.mark.parametrize("rule, text", [
    (syncs, "def op_out(x, out):\n    n = x.max().item()"),
    (autotuned, "@triton.autotune(configs=[], key=[])\n@triton.jit\ndef _kernel(x_ptr): pass"),
    (allocations, "def op_out(x, out):\n    scratch = torch.empty(3)"),
    (tolerances, "assert_close(a, b, rtol=1e-3, atol=0)"),
    (tolerances, "assert torch.allclose(a, b)"),
])
def test_a_broken_rule_is_seen(rule, text):
    assert rule(ast.parse(text))
    assert not rule(ast.parse("def op(x):\n    out = torch.empty_like(x)\n    op_out(x, out)\n    return out"))
