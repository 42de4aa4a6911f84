import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import Sampler
from ddim_fast.data.images import to_unit_range
from ddim_fast.data.resizing import fit_image
from ddim_fast.diffusion.interpolation import slerp
from ddim_fast.io.pictures import to_uint8
from ddim_fast.jobs.outputs import PngFolder
from ddim_fast.jobs.video import VideoJob, scan_frames


@pytest.fixture
def clip(tmp_path):
    """Six frames of a moving square: the folder, and (6, 3, 8, 8) uint8."""
    frames = np.full((6, 8, 8, 3), 60, np.uint8)
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(frames):
        frame[2:5, i : i + 3] = (200, 150, 30)
        Image.fromarray(frame).save(tmp_path / "clip" / f"{i}.png")
    return tmp_path / "clip", torch.from_numpy(frames).permute(0, 3, 1, 2)


def job(network, clip, batch_size, factor=3, **options):
    given = {"exact": False, "label": None, "guidance": None, "resize": "crop", **options}
    return VideoJob(Sampler(network, steps=3), clip[0], 6, factor, batch_size, **given)


def made(job, folder, ks=None):
    output = PngFolder(folder, job.batches)
    if ks is None:
        output.begin({"settings": {}})
    job.run(output.missing() if ks is None else ks, output, lambda k: None)
    return output


def frames_of(output):
    return np.concatenate([output.read(k) for k in range(len(output.batches))])


def test_between_the_frames_are_the_images_of_their_arc(clip, fake_network, tmp_path):
    of_one_class = job(fake_network(num_classes=4), clip, 64, label=2, guidance=1.5)
    frames = frames_of(made(of_one_class, tmp_path / "o"))
    assert frames.shape == (16, 8, 8, 3)
    np.testing.assert_array_equal(frames[::3], clip[1].permute(0, 2, 3, 1))
    request = {"labels": 2, "guidance": 1.5}
    latents = of_one_class.sampler.encode(to_unit_range(clip[1]).contiguous(), **request)
    x_T = slerp(latents[3], latents[4], torch.tensor([1 / 3, 2 / 3]))
    np.testing.assert_array_equal(frames[10:12], to_uint8(of_one_class.sampler.sample(x_T=x_T, **request)))


@pytest.mark.parametrize("batch_size", [1, 3, 6, 7, 15])
def test_batches_share_frames_but_encode_each_once(batch_size, clip, fake_network, tmp_path, monkeypatch):
    encoded, sampled = [], []
    encode, sample = Sampler.encode, Sampler.sample
    monkeypatch.setattr(Sampler, "encode", lambda s, images, **o: encoded.append(len(images)) or encode(s, images, **o))
    monkeypatch.setattr(Sampler, "sample", lambda s, **o: sampled.append(len(o["x_T"])) or sample(s, **o))
    network = fake_network()
    output = made(job(network, clip, batch_size), tmp_path / "parts")
    assert output.missing() == [] and sum(encoded) == 6 and sum(sampled) == 10
    assert max(encoded) <= max(2, batch_size) and max(sampled) <= max(2, batch_size)
    np.testing.assert_array_equal(frames_of(output), frames_of(made(job(network, clip, 64), tmp_path / "whole")))


@pytest.mark.parametrize("ks", [[1], [0, 3], [2, 4, 5]])
def test_any_batches_can_be_made_again(ks, clip, fake_network, tmp_path):
    parts = job(fake_network(), clip, 3)
    output = made(parts, tmp_path / "o")
    assert len(parts.batches) == 6 and len(parts.batches[5][0]) == 1
    whole = frames_of(output)
    for k in ks:
        output.files(k)[0].unlink()
    assert output.missing() == ks
    np.testing.assert_array_equal(frames_of(made(parts, tmp_path / "o", ks)), whole)


def test_frames_of_another_size_are_resized_as_asked(clip, fake_network, tmp_path):
    wide = tmp_path / "wide"
    wide.mkdir()
    for i in range(2):
        Image.linear_gradient("L").resize((32, 16)).convert("RGB").save(wide / f"{i}.png")
    for how in ("crop", "pad", "stretch"):
        frames = VideoJob(Sampler(fake_network(), steps=1), wide, 2, 2, 8, False, None, None, how)
        output = made(frames, tmp_path / how)
        expected = fit_image(Image.open(wide / "0.png"), 3, 8, how)
        np.testing.assert_array_equal(output.read(0)[0], expected.transpose(1, 2, 0))


def test_frames_are_counted_and_told_apart(clip, tmp_path):
    folder, _ = clip
    count, checksum, size = scan_frames(folder)
    assert count == 6 and size == (8, 8) and scan_frames(folder) == (6, checksum, size)
    (folder / "5.png").rename(folder / "05.png")  # a name alone is no other film
    assert scan_frames(folder) == (6, checksum, size)
    (folder / "0.png").rename(folder / "6.png")
    assert scan_frames(folder)[1] != checksum
    Image.new("RGB", (8, 9)).save(folder / "7.png")
    with pytest.raises(ValueError, match="the first is 8x8, and frame 7 is 8x9"):
        scan_frames(folder)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 9)).save(tmp_path / "one" / "7.png")
    with pytest.raises(ValueError, match=r"a film needs at least two frames; .*one has 1"):
        scan_frames(tmp_path / "one")
