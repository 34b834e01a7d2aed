"""Memory on the torch backend is linear in the length, whatever is asked for."""

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.ops import memory_growth

# MiB by which a call may need more at twice the length. What is linear grows by one or two MiB in these calls; the kept
# weights of dropout would by 6, a mask [L, S] in float32 by 12, scores by 24.
MOST_GROWTH = 5.0


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory of a CPU process is read from Linux's /proc")
def test_attention_memory_grows_with_the_length_and_not_with_its_square():
    """Users trained at lengths of 8192, where causality together with padding once took 650 MiB in place of 56."""
    # glibc would keep what is freed, and in pieces that do not fit: here every large tensor is returned at once
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.ops.memory_growth"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(memory_growth.NAMES)
    if any(None in pair for pair in found.values()):
        pytest.skip("this system does not tell a process its peak memory (/proc/self/clear_refs)")
    too_much = {name: pair for name, pair in found.items() if pair[1] - pair[0] > MOST_GROWTH}
    assert not too_much, f"MiB at L = {memory_growth.LENGTH} and at twice that: {too_much}"
