import numpy as np
import pytest
import torch

from ddim_fast import Sampler
from ddim_fast.io.pictures import to_uint8
from ddim_fast.jobs.outputs import Batches, NpzFile, PngFolder
from ddim_fast.jobs.sampling import Job


def batches(sampler, count, size) -> Batches:
    channels, height, width = sampler.config.image_shape
    return Batches(range(count), [i % 10 for i in range(count)], size, (height, width, channels))


def all_pictures(job) -> np.ndarray:
    return np.concatenate([job.pictures(k) for k in range(len(job.batches))])


@pytest.fixture
def network(fake_network):
    """A class-conditional fake network that counts the images of its calls, and has room for ``network.room`` of them."""
    network = fake_network(num_classes=10)
    network.room, network.sizes = 1000, []
    network.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def check(module, arguments):
        network.sizes.append(len(arguments[0]))
        if len(arguments[0]) > network.room:
            raise network.error

    network.register_forward_pre_hook(check)
    return network


def cpu_out_of_memory() -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    return raised.value


def test_batches_are_what_the_sampler_makes(network):
    sampler = Sampler(network, steps=3, eta=1.0)
    expected = to_uint8(sampler.sample(seeds=range(7), labels=range(7)))
    np.testing.assert_array_equal(all_pictures(Job(sampler, batches(sampler, 7, 3))), expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), cpu_out_of_memory()])
def test_out_of_memory_halves_what_is_sampled_at_once_and_loses_nothing(network, error, capsys):
    sampler = Sampler(network, steps=3, eta=1.0)
    b = batches(sampler, 21, 8)
    expected = all_pictures(Job(sampler, b))
    network.room, network.error = 3, error
    network.sizes.clear()
    job = Job(sampler, b)
    job.warm_up(0)
    assert network.sizes == [8, 4, 2]
    np.testing.assert_array_equal(all_pictures(job), expected)
    assert max(network.sizes[3:]) == 2  # later batches do not try again what failed
    assert capsys.readouterr().err.splitlines() == [
        f"out of memory: continuing with {n} images per network call" for n in (4, 2)
    ]


def test_memory_that_runs_out_in_the_middle_of_a_batch_starts_it_again(network):
    sampler = Sampler(network, steps=3)
    b = batches(sampler, 4, 4)
    expected = all_pictures(Job(sampler, b))
    seen = []

    def on_step(step):
        seen.append((step.call, step.calls, step.state.step, len(step.state.x)))
        network.room = 2 if len(seen) == 2 else network.room

    np.testing.assert_array_equal(Job(sampler, b, None, lambda k: on_step).pictures(0), expected)
    assert seen == [(0, 1, 0, 4), (0, 1, 1, 4), *[(call, 2, step, 2) for call in (0, 1) for step in (0, 1, 2)]]


def test_too_little_memory_for_one_image_is_one_line(network):
    network.room = 0
    sampler = Sampler(network, steps=3)
    with pytest.raises(RuntimeError, match="out of memory: cpu has too little for a single image") as raised:
        Job(sampler, batches(sampler, 5, 5)).pictures(0)
    assert "\n" not in str(raised.value)


def test_other_errors_are_not_taken_for_it(network):
    network.room, network.error = 0, RuntimeError("a bug")
    sampler = Sampler(network, steps=3)
    with pytest.raises(RuntimeError, match="a bug"):
        Job(sampler, batches(sampler, 5, 5)).pictures(0)
    assert len(network.sizes) == 1


def test_a_compiled_network_sees_batches_of_one_size(network, monkeypatch):
    eager = Sampler(network, steps=3)
    expected = all_pictures(Job(eager, batches(eager, 7, 3)))
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)
    sampler = Sampler(network, steps=3, engine="compiled")
    network.sizes.clear()
    job = Job(sampler, batches(sampler, 7, 3))
    job.warm_up(2)
    np.testing.assert_array_equal(all_pictures(job), expected)
    assert set(network.sizes) == {3}


def test_run_writes_each_batch(network, tmp_path):
    sampler = Sampler(network, steps=2)
    output = NpzFile(tmp_path / "a.npz", batches(sampler, 7, 3))
    output.begin({"settings": {}})
    job, made = Job(sampler, output.batches), []
    job.run([2, 0], output, made.append)
    assert made == [2, 0] and output.missing() == [1]
    np.testing.assert_array_equal(output.read(2), job.pictures(2))


def test_an_error_of_writing_ends_the_run(network, tmp_path):
    sampler = Sampler(network, steps=2)
    output = PngFolder(tmp_path / "nowhere", batches(sampler, 9, 1))
    made = []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Job(sampler, output.batches).run(range(9), output, made.append)
    assert len(made) <= 2


def test_images_that_are_not_finite_are_not_written(network, tmp_path):
    with torch.no_grad():
        network.weight.fill_(float("nan"))
    sampler = Sampler(network, steps=2)
    output = PngFolder(tmp_path, batches(sampler, 4, 2))
    with pytest.raises(ValueError, match="not finite; try --dtype float32"):
        Job(sampler, output.batches).run([0, 1], output, lambda k: None)
    assert list(tmp_path.iterdir()) == []
