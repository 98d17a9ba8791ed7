import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import memory
from harness.memory import available_memory

_ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


def test_available_memory_is_that_of_this_machine():
    assert 1e6 < available_memory("cpu") < 1e14


def test_what_the_allocator_keeps_of_a_device_is_free(monkeypatch):
    for name, told in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert available_memory("cuda:0") == 140


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("_in_bytes", "~").replace("_", ".").replace("~", "_in_bytes")).write_text(f"{value}\n")


def membership(tmp_path, *lines):
    file = tmp_path / "cgroup"
    file.write_text("\n".join(lines))
    return file


def test_a_container_of_version_2_leaves_its_limit_less_what_it_uses(tmp_path):
    root = tmp_path / "fs"
    group(root / "pod" / "run", memory_max="max", memory_current=GB, memory_stat="anon 5\ninactive_file 100")
    group(root / "pod", memory_max=4 * GB, memory_current=3 * GB, memory_stat="inactive_file 1000")
    assert memory._group_memory(root, membership(tmp_path, "0::/pod/run")) == [GB + 1000]


def test_a_container_of_version_1_does_too(tmp_path):
    root = tmp_path / "fs"
    group(
        root / "memory" / "job",
        memory_limit_in_bytes=2 * GB, memory_usage_in_bytes=GB, memory_stat="total_inactive_file 7",
    )  # fmt: skip
    group(
        root / "memory", memory_limit_in_bytes=9223372036854771712, memory_usage_in_bytes=GB, memory_stat="cache 0"
    )  # fmt: skip
    assert memory._group_memory(root, membership(tmp_path, "5:cpu:/job", "4:memory:/job")) == [GB + 7]


@pytest.mark.parametrize("lines", [(), ("nonsense",), ("0::/gone",)])
def test_without_groups_there_is_no_limit_of_theirs(tmp_path, lines):
    assert memory._group_memory(tmp_path / "fs", membership(tmp_path, *lines)) == []


def test_a_limit_of_the_shell_counts():
    script = (
        "import resource, psutil; from harness import memory;"
        "limit = psutil.Process().memory_info().vms + 5 * 10**8;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "print(*memory._address_space(), memory.available_memory('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, check=True)
    left, available = map(int, done.stdout.split())
    assert 3 * 10**8 < left <= 5 * 10**8
    assert available <= 5 * 10**8  # less, if the machine has less
