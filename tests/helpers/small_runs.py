"""What the tests of training share: the options of a run that takes no time."""

NETWORK = [
    "--preset=grey-32",
    "--set",
    "sample_size=8",
    "base_channels=8",
    "channel_multipliers=[1,2]",
    "layers_per_block=1",
    "attention_resolutions=[4]",
    "norm_num_groups=4",
    "num_train_timesteps=4",  # and as many steps for each grid of samples
]
RUN = [*NETWORK, "--batch-size=4", "--warmup=0", "--lr=1e-3", "--dtype=float32", "--device=cpu", "--log-every=2", "--quiet"]


def assert_one_line(text: str, *parts: str) -> None:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert all(part in text for part in parts), text
