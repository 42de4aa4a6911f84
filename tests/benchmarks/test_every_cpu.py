import every_cpu
import torch

from ddim_fast import UNet, UNetConfig


def test_the_shapes_of_a_network_are_counted():
    fields = {"channel_multipliers": (1, 2), "layers_per_block": 1, "attention_resolutions": ()}
    config = UNetConfig(sample_size=8, base_channels=32, **fields)
    with torch.no_grad():
        seen = every_cpu.shapes_of(UNet(config).eval(), 2)
    # Of images, weights, whether something is added, and whether they are enlarged.
    # At 8x8 one block on the way down and two up, whose second convolutions add the first ones' input.
    assert seen["conv3x3"][(2, 32, 8, 8), (32, 32), True, False] == 1 + 2
    assert seen["conv3x3"][(2, 64, 4, 4), (64, 64), False, True] == 1
    assert sum(seen["conv3x3"].values()) == 2 * (1 + 1 + 2 + 2 + 2) + 1
    assert seen["group_norm_silu"][(2, 64, 8, 8), 32, True, False, 32] == 1


def test_the_table_has_a_line_for_each_kind():
    kind = {"operator": "conv3x3", "instruction set": "avx2", "dtype": "float32", "memory format": "channels_last"}
    rows = [{**kind, "ratio": ratio, "chosen": True} for ratio in (1.0, 2.0, 4.0)]
    assert every_cpu.table(rows).splitlines()[2] == (
        "| conv3x3 | avx2 | float32 | channels_last | 3 | 1.00 | 2.00 | 4.00 | yes |"
    )
