"""How the programs of a row settle who ends it: the last to arrive, who finds there what the others stored."""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, total):
    """True for the last of `total` programs, who finds the counter at zero for the next launch. It loads what others stored past the L1 (".cg")."""
    tl.debug_barrier()                                                            # every thread's stores are out before the count says so
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1 == total
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
