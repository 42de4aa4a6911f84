"""The README's examples, as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_api_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(EXAMPLES[0], names)
    assert [path.name for path in sorted(tmp_path.glob("samples/*"))] == [f"{i}.png" for i in range(10)]
    assert names["images"].shape == names["latents"].shape == (10, 3, 32, 32)
    assert names["images"].dtype == torch.float32 and names["images"].abs().max() < 1.5
    assert names["latents"].std() == pytest.approx(1.0, abs=0.25)
    assert len(names["timesteps"]) == 20


def test_the_loop_example():
    # The network that knows the image is a point at zero: eps = x / sqrt(1 - alphas_cumprod). The sampler must find it.
    names: dict = {}
    exec(EXAMPLES[1].split("x = torch.randn")[0], names)
    bar = names["schedule"].alphas_cumprod
    names["your_network"] = lambda x, t: x / (1 - bar[t]) ** 0.5
    exec(EXAMPLES[1], names)
    torch.testing.assert_close(names["x"], torch.zeros(4, 3, 32, 32), atol=1e-4, rtol=0)


def test_the_example_with_a_table():
    names: dict = {}
    exec(EXAMPLES[1].split("x = torch.randn")[0], names)
    names["x"] = names["eps"] = torch.ones(2, 3, 4, 4)
    exec(EXAMPLES[2], names)
    expected = names["fast_ddim_step"](torch.ones(2, 3, 4, 4), names["eps"], *names["levels"][:2])
    torch.testing.assert_close(names["x"], expected)


def test_the_example_of_the_operators():
    names: dict = {}
    exec(EXAMPLES[3], names)
    assert names["h"].shape == (2, 1, 1024, 96) and names["h"].isfinite().all()


@pytest.fixture
def diffusers_folder(tmp_path):
    pytest.importorskip("diffusers")
    from ddim_fast import UNet, UNetConfig
    from ddim_fast.models.formats.diffusers import save_diffusers

    config = UNetConfig(sample_size=8, base_channels=16, channel_multipliers=(1, 2), norm_num_groups=8, layers_per_block=1)
    save_diffusers(tmp_path / "model", config, UNet(config).state_dict())
    return str(tmp_path / "model")


def test_the_example_with_diffusers(diffusers_folder):
    names: dict = {"folder": diffusers_folder}
    exec(EXAMPLES[4], names)
    assert len(names["images"]) == 2 and type(names["pipe"].scheduler).__name__ == "FastDDIMScheduler"


def test_the_example_of_acceleration(diffusers_folder, capsys):
    names: dict = {"folder": diffusers_folder}
    exec(EXAMPLES[5], names)
    assert len(names["images"]) == 2 and not names["report"].left_alone
    assert "ResnetBlock2D by group_norm_silu, conv3x3" in capsys.readouterr().out
    assert type(names["pipe"].scheduler).__name__ == "DDIMScheduler"


# What the examples take from their reader.
GIVEN = "from torch import Tensor\nfolder: str\ndef your_network(x: Tensor, t: int) -> Tensor:\n    return x\n"


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
    whole = [EXAMPLES[0], EXAMPLES[1] + EXAMPLES[2], *EXAMPLES[3:]]
    for i, example in enumerate(whole):
        (tmp_path / f"example_{i}.py").write_text(GIVEN + example + "\nimages.undefined\n" * (i == 0))
    (tmp_path / "arrays.py").write_text(ARRAYS)
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, *tmp_path.glob("*.py")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    # The types are really there: a name that tensors lack is found.
    assert re.fullmatch(r'.*example_0.py:\d+: error: "Tensor" has no attribute "undefined".*\nFound 1 error .*\n', output), (
        output
    )


def test_the_commands_exist():
    import importlib.util

    for command in set(re.findall(r"python -m (ddim_fast\.\w+)", README)):
        assert importlib.util.find_spec(command), command


def test_relative_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
