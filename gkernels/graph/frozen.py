"""frozen(): from here on nothing may be compiled. What Triton would compile or load becomes an error that says which part of its key is new.

A compilation in a served step costs a second, inside a capture it costs the capture; either way something that should be one binary is two:
an integer that is 1 or a multiple of 16, an address, a dtype, a constant or an option.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass


class CompiledAfterWarmUp(RuntimeError):
    """Triton was about to compile a kernel, or to load one for its first launch. It did neither."""


class frozen:
    """`with frozen(): ...` for a block, or `frozen()` for good; `thaw()` of what it returned ends it. Freezes may be nested.

    It sees every compiled Triton kernel of the process, in every thread, and no interpreted one. It does not see the modules that torch's own
    libraries load. An error leaves the kernel as it was: launched after a thaw, it compiles.

    Triton's own hooks do not serve: those of compilation fail on constants that JSON does not know before they call anybody, and after an error
    in that of loading the kernel has a launcher, which would launch a null function. Triton is imported here and not above, for whether its own
    helpers are interpreted is decided at its import, which gkernels.interpret.enable() must come before."""

    _active: list[frozen] = []
    _lock = threading.Lock()
    _thawed: tuple[Callable, Callable]

    def __init__(self):
        from triton.compiler import CompiledKernel
        from triton.runtime import JITFunction
        with self._lock:
            if not self._active:
                frozen._thawed = JITFunction._do_compile, CompiledKernel._init_handles
                JITFunction._do_compile, CompiledKernel._init_handles = _refuse_to_compile, _refuse_to_load
            self._active.append(self)

    def thaw(self) -> None:
        """Ends this freeze; a second call changes nothing."""
        from triton.compiler import CompiledKernel
        from triton.runtime import JITFunction
        with self._lock:
            if self in self._active:
                self._active.remove(self)
                if not self._active:
                    JITFunction._do_compile, CompiledKernel._init_handles = self._thawed

    def __enter__(self) -> frozen:
        return self

    def __exit__(self, *error) -> None:
        self.thaw()


def _refuse_to_compile(kernel, key, signature, device, constexprs, options, attrs, warmup):
    known = [key_of(k.src.signature, k.src.constants, k.src.attrs, {name: getattr(k.metadata, name) for name in options.__dict__})
             for k in kernel.device_caches[device][0].values() if hasattr(k, "src")]
    raise CompiledAfterWarmUp(f"gkernels.graph.frozen: {full_name(kernel)}: would be compiled after warm-up: "
                              f"{explain(key_of(signature, constexprs, attrs, options.__dict__), known)}")


def _refuse_to_load(compiled):
    if compiled.module is None:
        raise CompiledAfterWarmUp(f"gkernels.graph.frozen: {full_name(compiled.src.fn)}: would be loaded after warm-up: it was compiled but "
                                  "never launched; launch it once before frozen()")


def full_name(kernel) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"


def key_of(signature: dict, constants: dict, attrs: dict, options: dict) -> dict[str, str]:
    """What picks a kernel's binary, in words, by argument and by option: {"n": "i32 (a multiple of 16)", "BLOCK": "128", "num_warps": "4"}.

    `constants` and `attrs` are by path: (2,) is the third argument, (2, 0) the first item of the tuple there. A dataclass is taken apart."""
    words: dict[str, str] = {}
    for i, (name, kind) in enumerate(signature.items()):
        inside = {path[1:]: value for path, value in constants.items() if path[0] == i}
        value = inside.get((), inside)
        if is_dataclass(value) and not isinstance(value, type):
            words |= {f"{name}.{field.name}": repr(getattr(value, field.name)) for field in fields(value)}
        elif kind == "constexpr":
            words[name] = repr(value)
        else:
            details = [f"{value!r} at {path}" for path, value in inside.items()]
            details += [f"a multiple of 16{f' at {path[1:]}' * (len(path) > 1)}" for path, found in attrs.items() if path[0] == i and found]
            words[name] = f"{kind} ({', '.join(details)})" if details else str(kind)
    return words | {name: json.dumps(value, default=str) for name, value in options.items()}


def explain(new: dict[str, str], known: Iterable[dict[str, str]]) -> str:
    """Where a key differs from the one that is most like it, and the mend."""
    differences = [{name: (new.get(name, "absent"), other.get(name, "absent")) for name in other | new if new.get(name) != other.get(name)}
                   for other in known]
    if not differences:
        return "it has no binary for this device; launch it once before frozen()"
    changes = "; ".join(f"{name} is {now}, was {before}" for name, (now, before) in min(differences, key=len).items())
    return (f"{changes}, in the nearest of {len(differences)} binaries; launch it so before frozen(), or list run-time integers in do_not_specialize "
            "and pointers in do_not_specialize_on_alignment")
