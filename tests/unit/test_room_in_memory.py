"""What memory has room for is the least that the system and the control groups leave."""

from __future__ import annotations

import pytest

from actpipe.stores.memory import room_for_files


@pytest.fixture
def system(tmp_path):
    """Folders as of a Linux system with 8,000 kB available, and a function that says which groups the process is in."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")

    def found(line, limits):
        (proc / "self/cgroup").write_text(line)
        for folder, contents in limits.items():
            (groups / folder).mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (groups / folder / name).write_text(text)
        return room_for_files(proc, groups)

    return found


def test_without_limits_it_is_what_the_system_has(system):
    assert system("0::/a\n", {"a": {"memory.max": "max\n", "memory.stat": "anon 5\n"}}) == 8000 * 1024


def test_the_tightest_group_counts_less_what_it_cannot_let_go(system):
    limits = {
        "a": {"memory.max": "3000000\n", "memory.stat": "anon 1000000\nfile 700000\n"},
        "a/b": {"memory.max": "max\n", "memory.stat": "anon 10\n"},
    }
    assert system("0::/a/b\n", limits) == 2_000_000


def test_groups_of_the_first_version_count_too(system):
    limits = {"memory/a": {"memory.limit_in_bytes": "500\n", "memory.stat": "total_rss 600\n"}}
    assert system("5:cpu:/x\n4:memory,hugetlb:/a\n0::/\n", limits) == 0


def test_a_system_that_says_nothing_has_no_room(tmp_path):
    assert room_for_files(tmp_path, tmp_path) == 0


def test_here_it_is_less_than_there_is(system):
    assert 0 <= room_for_files() < 2**50
