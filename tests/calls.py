"""Representative calls of every room: the shapes and options that its configurations distinguish.

One list serves the compiler test (every kernel for every target), the specialisation census, the launch record and the dispatcher's opcheck.
A room's function takes a device and a dtype and yields (case, function, arguments).
"""

import torch

from tests.strategies import Batch, counter

ROOMS = {}


def room(calls):
    ROOMS[calls.__name__] = calls
    return calls


def all_calls(device, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    for name, calls in ROOMS.items():
        for dtype in dtypes:
            for case, function, arguments in calls(device, dtype):
                yield f"{name}.{case}.{str(dtype)[6:]}", function, arguments


@room
def rmsnorm(device, dtype):
    from gkernels.kernels import rmsnorm
    for T, D in ((3, 64), (3, 4096), (2, 16384)):
        x, weight = torch.zeros(T, D, dtype=dtype, device=device), torch.ones(D, dtype=dtype, device=device)
        yield f"rmsnorm D{D}", rmsnorm.rmsnorm_out, (x, weight, 1e-5, torch.empty_like(x), counter(2, device))
        yield f"add_rmsnorm D{D}", rmsnorm.add_rmsnorm_out, (x, x.clone(), weight, 1e-5, torch.empty_like(x), counter(2, device))
    q = torch.zeros(3, 6, 128, dtype=dtype, device=device)
    yield "heads", rmsnorm.rmsnorm_out, (q[:, :4], torch.ones(128, dtype=dtype, device=device), 1e-5, torch.empty_like(q[:, :4]))


@room
def schedule(device, dtype):
    from gkernels.kernels import schedule
    if dtype == torch.float32:                       # integers only: one dtype tells it all
        metadata = Batch([5, 1, 1], [0, 30, 7], 16, pads=9, spare_requests=1).metadata(device)
        yield "mixed", schedule.schedule_out, (*metadata, 16, 8, 4, schedule.Schedule.allocate(16, 4, 4, device))


@room
def attention(device, dtype):
    from gkernels.kernels import attention, schedule
    batch = Batch([5, 1, 1], [0, 30, 7], 16, pads=9, spare_requests=1)
    for G, D in ((1, 64), (4, 64), (4, 128), (7, 80), (16, 256)):
        q, (k_cache, v_cache) = torch.zeros(batch.T, G * 2, D, dtype=dtype, device=device), batch.caches(2, D, dtype, device)
        block_q = attention.config(G, D, dtype).BLOCK_Q
        plan = schedule.Schedule.allocate(batch.T, batch.R, block_q, device)
        for lse in (None, torch.zeros(batch.T, G * 2, device=device)):
            yield f"G{G} D{D}{' lse' if lse is not None else ''}", attention.attention_out, (
                q, k_cache, v_cache, batch.metadata(device)[2], plan.items, plan.num_items, torch.empty_like(q), lse)
