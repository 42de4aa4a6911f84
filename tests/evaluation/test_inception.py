import hashlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddim_fast.evaluation import inception
from ddim_fast.evaluation.inception import NAME, FeatureNetwork, Inception, load_inception, resize_bilinear


@pytest.fixture(scope="module")
def network() -> Inception:
    """The network with random weights and norms that do something."""
    torch.manual_seed(0)
    network = Inception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.fixture(scope="module")
def tensors(network) -> dict[str, torch.Tensor]:
    return {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("form", ["shards", "pth"])
def test_every_form_of_the_weights_gives_the_features(form, network, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", inception.tensors_checksum(tensors))
    if form == "shards":
        names = sorted(tensors)
        files = {name: f"{NAME}-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, tmp_path / file)
        (tmp_path / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        path = tmp_path
    else:  # as pytorch-fid distributes it, with the classifier
        path = tmp_path / "weights.pth"
        torch.save({**network.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    loaded = load_inception(path)
    with torch.no_grad():
        expected = network((resize_bilinear(pictures.float(), 299) - 128) / 128)
    torch.testing.assert_close(loaded(pictures), expected, atol=1e-4, rtol=1e-4)
    assert loaded.name == NAME and loaded.features == 2048 and expected.std() > 0


def test_other_weights_need_a_name_which_carries_their_checksum(tensors, tmp_path, monkeypatch):
    """The tensors have the names of the published ones: only their values tell them apart."""
    path = tmp_path / "other.pth"
    torch.save(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_inception(path)
    assert f"{path}: not the published weights of {NAME}" in str(caught.value)
    assert f"--inception NAME={path}" in str(caught.value) and "\n" not in str(caught.value)
    assert load_inception(path, "mine").name == f"mine sha256:{inception.tensors_checksum(tensors)[:16]}"
    monkeypatch.setattr(inception, "_PTH_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_inception(path, "mine").name == NAME


def test_a_checksum_is_of_names_shapes_and_values():
    tensors = [{name: torch.full(shape, value)} for name in "ab" for shape in ((2, 3), (3, 2)) for value in (0.0, 1.0)]
    assert len({inception.tensors_checksum(t) for t in tensors}) == 8
    a, b = torch.zeros(2, 3), torch.ones(3, 2).T
    same = ({"a": a, "b": b}, {"b": b.contiguous(), "a": a})
    assert len({inception.tensors_checksum(t) for t in same}) == 1


def test_pictures_of_any_sizes_are_seen_each_as_it_is(tiny_network):
    shapes = [(3, 8, 8), (1, 5, 9), (3, 30, 20), (1, 8, 8), (1, 8, 8)]
    pictures = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    each = torch.cat([tiny_network(picture[None]) for picture in pictures])
    torch.testing.assert_close(tiny_network.of(iter(pictures), batch_size=3), each)


def test_grey_pictures_are_seen_as_rgb(network):
    seen = []
    tiny = FeatureNetwork(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 2)), "tiny", 2, size=3)
    tiny.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tiny(torch.tensor([[[[0, 255], [128, 64]]]], dtype=torch.uint8))
    assert seen[0].shape == (1, 3, 3, 3) and torch.equal(seen[0][:, 0], seen[0][:, 2])
    assert seen[0].min() == -1 and seen[0].max() == 127 / 128


@pytest.mark.parametrize("size", [(5, 5), (32, 32), (301, 299), (4, 7)])
def test_the_resize_is_tensorflows(size):
    x = torch.randint(0, 256, (1, 2, *size)).float()
    y = resize_bilinear(x, 299)

    def source(i, before):  # tf.image.resize_bilinear(align_corners=False), TensorFlow 1
        position = i * before / 299
        low = math.floor(position)
        return low, min(low + 1, before - 1), position - low

    for i, j in [(0, 0), (298, 298), (150, 3), (17, 231), (297, 1)]:
        (top, bottom, v), (left, right, h) = source(i, size[0]), source(j, size[1])
        upper = x[..., top, left] * (1 - h) + x[..., top, right] * h
        lower = x[..., bottom, left] * (1 - h) + x[..., bottom, right] * h
        expected = upper * (1 - v) + lower * v
        torch.testing.assert_close(y[..., i, j], expected, atol=1e-2, rtol=0)  # positions are float32, as TensorFlow's


def test_weights_of_something_else_are_refused(tensors, tmp_path):
    missing, other, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    first = sorted(tensors)[0]
    whole = {n: t.contiguous() for n, t in tensors.items()}
    save_file({n: t for n, t in whole.items() if n != first}, missing)
    save_file(whole | {first: torch.zeros(3)}, other)
    save_file(whole | {first: torch.full_like(whole[first], float("nan"))}, bad)
    for path, words in ((missing, f"missing tensor '{first}'"), (other, "(3,)"), (bad, "not finite")):
        with pytest.raises(ValueError) as caught:
            load_inception(path)
        assert str(path) in str(caught.value) and words in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_inception(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no inception-2015-12-05\.safetensors"):
        load_inception(tmp_path)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_weights_that_are_no_arrays_are_refused(kind, tensors, tmp_path):
    first = sorted(tensors)[0]
    bad = tensors[first].to("meta") if kind == "meta" else tensors[first].to_sparse()
    torch.save({**tensors, first: bad}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: tensor '{first}' is no array of floating-point numbers"):
        load_inception(tmp_path / "a.pth")


def test_a_pickle_with_code_is_not_executed(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"x": np.array}))
    with pytest.raises(ValueError, match=r"weights\.pth"):
        load_inception(path)
