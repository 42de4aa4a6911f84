import torch

from ddim_fast.models.checksum import weights_checksum


def test_the_checksum_is_that_of_weights_and_configuration(small_unet, fake_network, tmp_path):
    checksum = weights_checksum(small_unet)
    small_unet.save_pretrained(tmp_path / "a")
    assert weights_checksum(type(small_unet).from_pretrained(tmp_path / "a")) == checksum and len(checksum) == 64
    with torch.no_grad():
        small_unet.conv_out.bias[0] += 1e-6
    assert weights_checksum(small_unet) != checksum
    assert weights_checksum(fake_network()) != weights_checksum(fake_network(prediction_type="v_prediction"))


def test_what_the_classes_are_called_is_no_part_of_it(fake_network):
    plain, named = fake_network(num_classes=2), fake_network(num_classes=2, class_names=("cat", "dog"), guidance=2.0)
    assert weights_checksum(plain) == weights_checksum(named)
