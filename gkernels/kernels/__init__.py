"""Rooms: one Triton op each. Import the room (`from gkernels.kernels import rmsnorm`), then call `rmsnorm.rmsnorm(...)`."""
