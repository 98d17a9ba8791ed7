"""How much memory this process may still take: the machine's, and what a container or a limit leaves of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Above this a version 1 group has no limit; the kernel writes the largest multiple of a page.
_UNLIMITED = 1 << 60


def available_memory(device: str) -> int:
    """Bytes free on the device; for the CPU the least of what the machine, a control group and RLIMIT_AS leave."""
    where = torch.device(device)
    if where.type == "cuda":
        free = int(torch.cuda.mem_get_info(where)[0])
        # What torch's allocator keeps of tensors that are gone counts as used there, and is given out again.
        return free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    limits = [int(psutil.virtual_memory().available), *_group_memory(_CGROUPS, Path("/proc/self/cgroup"))]
    return max(0, min(limits + _address_space()))


def _group_memory(root: Path, membership: Path) -> list[int]:
    """What the control groups of this process leave: version 2 (memory.max) and version 1 (memory.limit_in_bytes).

    A group may take as much as the tightest of its parents; inside a container its own root is all that is visible.
    """
    free = []
    with suppress(OSError, ValueError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                start, limit, used = root, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                start, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = start / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(start):
                    break
                with suppress(OSError, ValueError):  # "max" is no number: no limit
                    most = int((folder / limit).read_text(encoding="utf-8"))
                    if most < _UNLIMITED:
                        free.append(most - int((folder / used).read_text(encoding="utf-8")) + _reclaimable(folder))
    return free


def _reclaimable(group: Path) -> int:
    """Bytes of files that the group has read and the kernel gives up when memory is short."""
    for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _address_space() -> list[int]:
    """What RLIMIT_AS leaves, where it is set (`ulimit -v`); nothing on systems without it."""
    try:
        import resource
    except ImportError:
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]
