"""Timings. `python -m bench [room ...]` runs them on a GPU and merges the figures into bench/results/<device>.json."""
