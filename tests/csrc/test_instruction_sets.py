"""The tests of the C++ operators on a lesser processor than this one, each in a process of its own: the choice is made once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddim_fast.ops import native

TESTS = Path(__file__).resolve().parents[1]
OPERATORS = {
    "conv3x3": [TESTS / "ops" / "test_conv3x3.py"],
    "group_norm_silu": [TESTS / "ops" / "test_group_norm_silu.py", "-k", "native and not compile"],
    "ddim_step": [TESTS / "csrc" / "test_ddim_step.py"],
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(native.module is None, reason=str(native.why_not))]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_lesser_processors_pass_the_same_tests(instruction_set, operator):
    if native.module.instruction_set() == "baseline" or os.environ.get("DDIM_FAST_CPU"):
        pytest.skip("this processor is the least one")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, OPERATORS[operator])]
    environment = os.environ | {"DDIM_FAST_CPU": instruction_set, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize("asked", ["baseline", "avx2"])
def test_less_can_be_asked_for(asked):
    if native.module.instruction_set() == "baseline":
        pytest.skip("this processor is the least one")
    script = "from ddim_fast.ops.native import module as m; print(m.instruction_set(), m.conv3x3_has_bf16())"
    output = subprocess.check_output([sys.executable, "-c", script], env=os.environ | {"DDIM_FAST_CPU": asked}, text=True)
    assert output.split() == [asked, "False"]
