"""A progress bar: tqdm's on a terminal, nothing off it and where tqdm is not installed."""

from __future__ import annotations


class _Silent:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def update(self, n=1):
        pass

    def close(self):
        pass


def progress(items=None, wanted=True, **options):
    """A bar over `items`, or one that is moved by `update(n)`; `options` are tqdm's (desc, unit, total, file)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent(items or ())
    return tqdm(items, disable=None if wanted else True, **options)
