"""All images are told of, whatever makes them, and each network call."""

import numpy as np
import pytest
import torch

from ddim_fast import Sampler
from ddim_fast.diffusion.degradations import Downscale
from ddim_fast.diffusion.restoration import TimeTravel
from ddim_fast.io.progress import watch


def told(function, *arguments, **options):
    """The images and network calls that ``function`` tells of."""
    parts = []
    with watch(lambda *what: parts.append(what)):
        function(*arguments, **options)
    return tuple(np.sum(parts, axis=0))


@pytest.mark.parametrize(
    "options,request_,calls",
    [
        ({}, {}, 2 * 4),
        pytest.param({"engine": "compiled"}, {"batch_size": 5}, 4, marks=pytest.mark.slow),
        ({"solver": "unipc"}, {"guidance": 2.0}, 2 * 4),
        ({"eta": 1.0}, {"on_step": lambda state: None}, 2 * 4),
    ],
)
def test_sampling(fake_network, options, request_, calls):
    sampler = Sampler(fake_network(num_classes=4), steps=4, **options)
    images, evaluations = told(sampler.sample, **{"seeds": range(5), "labels": 1, "batch_size": 3, **request_})
    assert images == pytest.approx(5) and evaluations == calls


def test_sampling_to_a_tolerance(fake_network):
    sampler = Sampler(fake_network(), tolerance=0.05)
    images, evaluations = told(sampler.sample, seeds=range(5))
    assert images == pytest.approx(5) and evaluations == sampler.evaluations.max()


def test_inversion(fake_network):
    sampler = Sampler(fake_network(), steps=4)
    images = sampler.sample(seeds=range(5)).clamp(-1, 1)
    assert told(sampler.encode, images, batch_size=3) == (pytest.approx(5), 8)
    exact, evaluations = told(sampler.encode, images, batch_size=3, exact=True)
    assert exact == pytest.approx(5) and evaluations > 8


def test_restoration(fake_network):
    sampler, operator = Sampler(fake_network(), steps=4), Downscale(2)
    measurement = operator(torch.zeros(3, *sampler.image_shape))
    request = {"seeds": range(3), "travel": TimeTravel(1, 3)}
    timesteps, _ = sampler.restoration_steps(operator, travel=request["travel"])
    assert told(sampler.restore, measurement, operator, **request) == (pytest.approx(3), len(timesteps))


def test_python_shows_a_bar_where_it_is_asked_for(fake_network, capsys):
    sampler = Sampler(fake_network(), steps=4)
    images = sampler.sample(seeds=range(2))
    assert capsys.readouterr().err == ""
    sampler.sample(seeds=range(2), progress=True)
    assert "2/2 images" in (shown := capsys.readouterr().err) and "4 network calls" in shown
    sampler.encode(images, progress=True)
    assert "2/2 images" in capsys.readouterr().err
    sampler.restore(Downscale(2)(images), Downscale(2), seeds=range(2), progress=True)
    assert "2/2 images" in capsys.readouterr().err
