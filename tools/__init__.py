"""Programs for whoever maintains this repository; each is run from the root with `python -m`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say on stderr what is done, before it is done, and at its end how long it took."""
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    start = perf_counter()
    yield
    print(f"{perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
