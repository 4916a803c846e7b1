"""What a result must be read with: the machine and the versions."""

import os
import platform
import re
from pathlib import Path

from asga.info import collect


def machine_facts() -> dict[str, object]:
    """`asga.info.collect`, and what else decides about memory-bound work. Plain JSON values; null: unknown here.

    Libraries by name alone: results are for others to read.
    """
    facts = collect()
    return {
        "cpu_model": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        "cores": os.cpu_count(),
        "memory_bytes": _kilobytes("MemTotal"),
        "transparent_huge_pages": _first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        **facts,
        "libraries": [Path(path).name for path in facts["libraries"]],
    }


def available_memory() -> int | None:
    """Bytes of main memory that programs can still take, or None if the system does not say."""
    return _kilobytes("MemAvailable")


def _kilobytes(name: str) -> int | None:
    found = _first_match("/proc/meminfo", rf"{name}:\s*(\d+) kB")
    return None if found is None else 1024 * int(found)


def _first_match(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    return None if found is None else found[1]
