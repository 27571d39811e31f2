"""Faces that other projects' code already calls, on gkernels' ops. Each is a module of its own that nothing imports unasked."""
