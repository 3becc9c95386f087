"""What a report says about its machine and packages. Every script of benchmarks/ that writes a report imports it."""

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def processor_name() -> str:
    """The CPU's name where Linux gives one, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def processor() -> str:
    return f"{processor_name()}, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def listed(versions: dict[str, Any], packages: Iterable[str] | None = None) -> str:
    """Versions as prose: "torch 2.13.0, transformers 5.24.0"; only those of `packages`, if given."""
    names = versions if packages is None else [name for name in packages if name in versions]
    return ", ".join(f"{name} {versions[name]}" for name in names)


def write_json(path: Path, results: Any) -> None:
    """Write a report whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    unfinished.replace(path)


def memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
