"""What the text of a callable says: calls that wait for the device, shapes and grids that follow data, autotuning, host generators.

The text is read, not run, so a branch that no case takes is read too; what the values are it cannot know. So its findings are notes until a
run confirms them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType

import torch

WAITS = {"item", "tolist", "cpu", "numpy", "synchronize"}
SHAPES = {"nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "bincount"}
CONSTANTS = {"torch.tensor", "torch.as_tensor", "torch.from_numpy"}
GENERATORS = ("random.", "np.random.", "numpy.random.", "torch.rand", "torch.bernoulli", "torch.multinomial")
READS = {"item", "tolist", "max", "min", "sum"}                      # methods that make a grid from contents
LIBRARIES = {"torch", "triton", "numpy"}


def lint(subject: Callable) -> list[tuple[str, str, str]]:
    """(name, "file:line", what) for a callable and, as far as their names lead, the Python functions that it calls."""
    found: list[tuple[str, str, str]] = []
    queue, seen = [subject], set()
    while queue:
        function, owner = unwrapped(queue.pop())
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        try:
            text, first = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(text)))
            queue += called(tree, function, owner)
        except (OSError, SyntaxError, ValueError):      # no file behind it, a lambda inside a longer line, a name that is not bound yet
            continue
        file = inspect.getsourcefile(function) or "?"
        found += [(name, f"{file}:{first + line - 1}", what) for name, line, what in findings(tree)]
    return list(dict.fromkeys(found))


def unwrapped(subject) -> tuple[FunctionType | None, object]:
    """The Python function behind a callable and the object that it is bound to; (None, None) for a kernel, a class or a built-in one."""
    if hasattr(subject, "arg_names"):                   # a @triton.jit function
        return None, None
    if isinstance(subject, torch.nn.Module):
        subject = subject.forward
    elif not isinstance(subject, FunctionType | MethodType | type):
        subject = member(subject, "__call__") or subject
    owner = getattr(subject, "__self__", None)
    subject = inspect.unwrap(getattr(subject, "__func__", subject))
    foreign = not isinstance(subject, FunctionType) or (subject.__module__ or "").partition(".")[0] in LIBRARIES
    return (None, None) if foreign else (subject, owner)


def called(tree: ast.AST, function: FunctionType, owner: object) -> list:
    """The objects that a function calls by a plain or a dotted name."""
    outer = inspect.getclosurevars(function)
    names = outer.globals | outer.nonlocals | ({function.__code__.co_varnames[0]: owner} if owner is not None else {})
    objects = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, *rest = ast.unparse(node.func).split(".")
            target = names.get(head)
            for part in rest:
                target = held_by(target).get(part, member(target, part))
            objects += [target] if callable(target) else []
    return objects


def held_by(target: object) -> dict[str, object]:
    """What stands in an object by name, the modules of a torch module among it."""
    own = vars(target) if hasattr(target, "__dict__") else {}
    return {**own, **own.get("_modules", {})} if isinstance(target, torch.nn.Module) else own


def member(target: object, name: str):
    """A method without running a property."""
    found = inspect.getattr_static(type(target), name, None)
    return MethodType(found, target) if isinstance(found, FunctionType) else None


def findings(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(name, line, what) of every suspicious expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if "autotune" in ast.unparse(decorator):
                    yield "autotune", decorator.lineno, "is tuned by timing it when its key changes"
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Compare) or (isinstance(node.slice, ast.UnaryOp) and isinstance(node.slice.op, ast.Invert)):
                yield "data-dependent-shape", node.lineno, f"{ast.unparse(node)} indexes by a mask: the shape depends on what it holds"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Subscript):                                    # kernel[grid](...)
            reads = READS & {n.func.attr for n in ast.walk(node.func.slice) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
            if reads:
                yield "data-dependent-grid", node.lineno, f"the grid {ast.unparse(node.func.slice)} is made by {', '.join(sorted(reads))}()"
        name, method = ast.unparse(node.func), getattr(node.func, "attr", "")
        first = node.args[0] if node.args else None
        if method in WAITS:
            yield "hidden-sync", node.lineno, f"{name}() waits for the device where it meets one of its tensors"
        elif method == "to" and isinstance(first, ast.Constant) and first.value == "cpu":
            yield "hidden-sync", node.lineno, f"{name}('cpu') copies to the host and waits"
        elif name == "print":
            yield "hidden-sync", node.lineno, "print() of a tensor waits for the device"
        elif method in SHAPES:
            yield "data-dependent-shape", node.lineno, f"{name}() gives a shape that depends on what the tensor holds"
        elif name in CONSTANTS:
            yield "host-constant", node.lineno, f"{name}() takes values of the host, which a graph freezes"
        elif name.startswith(GENERATORS):
            yield "host-rng", node.lineno, f"{name}() draws from a generator that the host moves on"
        elif name == "gc.collect":
            yield "gc-in-capture", node.lineno, "collects garbage while a capture may last"
