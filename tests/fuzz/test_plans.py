"""Damaged exports to plans: descriptions and weights whose checksums are right, as of another program's making."""

import pytest
import torch

from ddim_fast import UNet, UNetConfig
from ddim_fast.deploy import PlanSampler
from ddim_fast.deploy.folder import CHECKSUMS, PLAN, write_checksums
from ddim_fast.deploy.plan_export import export_plan
from ddim_fast.ops import native
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes, mutate_json

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.why_not))

SMALL = UNetConfig(
    sample_size=4, base_channels=16, channel_multipliers=(1,), layers_per_block=1, attention_resolutions=(), norm_num_groups=2
)


def write(folder):
    torch.manual_seed(0)
    export_plan(folder / "export", UNet(SMALL).eval().requires_grad_(False), steps=1)
    return [folder / "export" / name for name in ("config.json", PLAN, CHECKSUMS, "weights.safetensors")]


def read(path):
    folder = path.parent
    if path.name != CHECKSUMS:
        write_checksums(folder)
    PlanSampler(folder).sample(seeds=[1, 2])


def mutate(random, data):
    return (mutate_json if data.startswith(b"{") else mutate_bytes)(random, data)


FUZZER = Fuzzer("plan", write, read, mutate)


def test_damaged_exports():
    FUZZER.check(200)


if __name__ == "__main__":
    main(FUZZER)
