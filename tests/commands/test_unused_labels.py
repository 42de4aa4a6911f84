"""Labels that nothing uses stop no command."""

import dataclasses
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddim_fast import UNet, edit, evaluate, reconstruct, restore, train

NETWORK = ("base_channels=8", "channel_multipliers=[1,2]", "layers_per_block=1", "attention_resolutions=[4]")
RUN = ("--steps=1", "--batch-size=2", "--warmup=0", "--device=cpu", "--dtype=float32", "--quiet", "--out=run")


@pytest.fixture
def named(here):
    """Three 16x16 images whose classes are names, with one missing."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, "png")
    images = [{"bytes": file.getvalue(), "path": None}] * 3
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog", None]}), here / "named.parquet")
    return here / "named.parquet"


@pytest.fixture
def unconditional(small_config, tmp_path):
    UNet(dataclasses.replace(small_config, num_classes=None)).save_pretrained(tmp_path / "unconditional")
    return tmp_path / "unconditional"


@pytest.mark.parametrize(
    "command,options",
    [
        (edit, ("--strength=0.5", "--steps=2")),
        (reconstruct, ("--steps=2",)),
        (restore, ("--task=deblur", "--sigma=1", "--steps=2")),
        (evaluate, ("--loss", "--num-images=2")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_of_a_model_without_classes(command, options, named, unconditional, run_here):
    data = ("--data", named) if command is evaluate else (named,)
    code, _, error = run_here(command, *data, "--model", unconditional, *options, "--quiet")
    assert code == 0, error


@pytest.mark.parametrize("chosen", ["3", "none"])
@pytest.mark.parametrize(
    "command,options",
    [
        (edit, ("--strength=0.5", "--steps=2")),
        (reconstruct, ("--steps=2",)),
        (restore, ("--task=deblur", "--sigma=1", "--steps=2")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_where_the_class_is_given(command, options, chosen, named, checkpoint, run_here):
    code, _, error = run_here(command, named, "--model", checkpoint, *options, f"--class={chosen}", "--quiet")
    assert code == 0, error
    code, _, error = run_here(command, named, "--model", checkpoint, *options, "--quiet", "--out=other")
    assert code != 0 and "named.parquet, row 0: class labels must be whole numbers from 0; got 'cat'" in error


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "sample_size=16", *NETWORK, "norm_num_groups=4"),
        ("--preset=autoencoder", "--set", "sample_size=16", "base_channels=8", "channel_multipliers=[1,2]"),
    ],
    ids=["network", "autoencoder"],
)
def test_in_training_without_classes(options, named, run_here):
    code, _, error = run_here(train, "--data", named, *options, *RUN)
    assert code == 0, error
