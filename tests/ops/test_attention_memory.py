"""Memory on the torch backend is linear in the length, whatever is asked for."""

import json
import platform
import subprocess
import sys

import pytest

from tests.ops import memory_growth

# MiB by which a call may need more at twice the length. What is linear grows by less than one MiB in these calls, and
# a block of scores, which does not depend on the length, can be one copy more or less; a mask [L, S] in float32 grows
# by 48, the kept weights of dropout by 24, scores by 96.
MOST_GROWTH = 20.0


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory of a CPU process is read from Linux's /proc")
def test_attention_memory_grows_with_the_length_and_not_with_its_square():
    """Users trained at lengths of 8192, where causality together with padding once took 650 MiB in place of 56."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.memory_growth"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(memory_growth.NAMES)
    if any(None in pair for pair in found.values()):
        pytest.skip("this system does not tell a process its peak memory (/proc/self/clear_refs)")
    too_much = {name: pair for name, pair in found.items() if pair[1] - pair[0] > MOST_GROWTH}
    assert not too_much, f"MiB at L = {memory_growth.LENGTH} and at twice that: {too_much}"
