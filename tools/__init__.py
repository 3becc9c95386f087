"""Programs for whoever maintains this repository; each is run from the root with `python -m`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
