"""The examples of README.md and docs/getting-started.md do what is said of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddim_fast import fast_ddim_step

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART, PIPELINE, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
START = re.findall(r"```python\n(.*?)```", (ROOT / "docs/getting-started.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(QUICKSTART, names)
    assert Image.open(tmp_path / "ten.png").size[0] > 10 * 32
    assert names["images"].shape == names["latents"].shape == (10, 3, 32, 32)
    assert names["images"].dtype == torch.float32 and names["images"].abs().max() < 1.5
    assert names["latents"].std() == pytest.approx(1.0, abs=0.25)


def test_the_loop_finds_what_its_network_knows():
    # The network that knows the image is a point at zero: eps = x / sqrt(1 - alphas_cumprod). The sampler must find it.
    names: dict = {}
    exec(LOOP, names)
    bar = names["schedule"].alphas_cumprod
    zero = LOOP.replace("return torch.zeros_like(x)", "return x / (1 - bar[t]) ** 0.5")
    assert zero != LOOP
    names["bar"] = bar
    exec(zero, names)
    torch.testing.assert_close(names["x"], torch.zeros(4, 3, 32, 32), atol=1e-4, rtol=0)


def test_the_step_with_a_table():
    names: dict = {}
    exec(START[1].split("x = ddim_step(")[0], names)
    x = names["x"]
    expected = fast_ddim_step(x, x, *names["levels"][:2])
    exec(START[1][START[1].index("x = ddim_step(") :], names)
    torch.testing.assert_close(names["x"], expected)


def test_the_operators():
    names: dict = {}
    exec(START[2], names)
    assert names["h"].shape == (2, 1, 1024, 96) and names["h"].isfinite().all()


def test_a_pipeline_of_diffusers(tmp_path, monkeypatch, capsys):
    diffusers = pytest.importorskip("diffusers")
    from ddim_fast import UNet, UNetConfig
    from ddim_fast.models.formats.diffusers import save_diffusers

    config = UNetConfig(sample_size=8, base_channels=16, channel_multipliers=(1, 2), norm_num_groups=8, layers_per_block=1)
    save_diffusers(tmp_path / "model", config, UNet(config).state_dict())
    load = diffusers.DDIMPipeline.from_pretrained
    monkeypatch.setattr(diffusers.DDIMPipeline, "from_pretrained", lambda name: load(tmp_path / "model"))
    names: dict = {}
    exec(PIPELINE, names)
    assert len(names["images"]) == 2 and "ResnetBlock2D by group_norm_silu, conv3x3" in capsys.readouterr().out


# Whose array goes in, comes out; what is none is found, or the checker calls the comment needless.
ARRAYS = """
from typing import Any
import numpy as np
from torch import Tensor
from typing_extensions import assert_type
from ddim_fast import fast_ddim_step

class Foreign:
    def __dlpack__(self, *, stream: int | None = None) -> object: ...
    def __dlpack_device__(self) -> object: ...

def step(a: Tensor, b: np.ndarray[Any, np.dtype[np.float32]], c: Foreign) -> None:
    assert_type(fast_ddim_step(a, a, 0.5, [0.6, 0.7], noise=a, seeds=[1], out=a), Tensor)
    assert_type(fast_ddim_step(b, b, b, b, unconditional_output=b), np.ndarray[Any, np.dtype[np.float32]])
    assert_type(fast_ddim_step(c, c, 0.5, 0.6), Foreign)
    assert_type(fast_ddim_step(a, b, c, 0.6), Tensor)
    fast_ddim_step("a", a, 0.5, 0.6)  # type: ignore[type-var]
    fast_ddim_step(a, 0.1, 0.5, 0.6)  # type: ignore[arg-type]
"""


@pytest.mark.slow
def test_a_type_checker_accepts_the_examples(tmp_path):
    pytest.importorskip("mypy")
    for i, example in enumerate([QUICKSTART, PIPELINE, LOOP, *START]):
        (tmp_path / f"example_{i}.py").write_text(example + "\nimages.undefined\n" * (i == 0))
    (tmp_path / "arrays.py").write_text(ARRAYS)
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, *tmp_path.glob("*.py")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    # The types are really there: a name that tensors lack is found.
    assert re.fullmatch(r'.*example_0.py:\d+: error: "Tensor" has no attribute "undefined".*\nFound 1 error .*\n', output), (
        output
    )
