"""DDIM on one screen: schedule, timesteps, solver and loop, from this package's public pieces.

python examples/ddim_in_60_lines.py        # writes ddim.png: 16 images of cifar10-64 in 20 steps
"""

from pathlib import Path

import torch

from ddim_fast import NoiseSchedule, Sampler, UNet, select_timesteps
from ddim_fast.io.pictures import image_grid, save_image


@torch.no_grad()
def ddim(model, x, labels, steps=20, eta=0.0, guidance=1.0):
    """Images from noise (Song, Meng and Ermon 2021, eq. 12).

    Args:
        model: predicts epsilon, v or x_0 from (x, timestep, labels).
        x: (N, C, H, W) float32, standard normal noise.
        labels: (N,) int64, or None.
        steps: S, the number of network evaluations.
        eta: 0 is deterministic; 1 has the variance of DDPM.
        guidance: the scale of classifier-free guidance; 1 for none.

    Yields x after each step; the last one is the images.
    """
    schedule = NoiseSchedule.from_config(model.config)
    timesteps = select_timesteps(schedule, steps, "quadratic")
    levels = [*schedule.alphas_cumprod[timesteps], 1.0]  # after the last step nothing is left of the noise
    for t, a, b in zip(timesteps.tolist(), levels[:-1], levels[1:], strict=True):
        output = model(x, torch.tensor(t), labels)
        if guidance != 1:
            unconditional = model(x, torch.tensor(t), None)
            output = unconditional + guidance * (output - unconditional)

        # What the prediction says of the image and of its noise, where x = sqrt(a) x_0 + sqrt(1 - a) epsilon.
        signal, sigma = a**0.5, (1 - a) ** 0.5
        if model.config.prediction_type == "epsilon":
            x0, epsilon = (x - sigma * output) / signal, output
        elif model.config.prediction_type == "v_prediction":
            x0, epsilon = signal * x - sigma * output, sigma * x + signal * output
        else:
            x0, epsilon = output, (x - signal * output) / sigma

        # The same image with less noise, old and fresh.
        fresh = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        x = b**0.5 * x0 + (1 - b - fresh**2) ** 0.5 * epsilon + fresh * torch.randn_like(x)
        yield x


if __name__ == "__main__":
    model = UNet.from_pretrained("cifar10-64")
    labels = torch.arange(16) % model.config.num_classes
    sampler = Sampler(model, steps=20)
    *_, images = ddim(model, sampler.noise(range(16)), labels)
    print("largest difference to Sampler:", float((images - sampler.sample(seeds=range(16), labels=labels)).abs().max()))
    save_image(Path("ddim.png"), image_grid(images, columns=8), scale=3)
    print("wrote ddim.png")
