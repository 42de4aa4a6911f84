"""The U-Net of DDPM and DDIM (Ho et al. 2020, appendix B; Song et al. 2021), optionally class-conditional.

Modules and parameters carry the names of diffusers' ``UNet2DModel``, so published DDPM weights load as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from .audio import AudioConfig
from .checkpoint import load_audio, load_checkpoint, load_coefficients, load_timesteps, local_model, save_checkpoint
from .config import UNetConfig
from .unet_blocks import (
    Attention,
    Conv3x3,
    Convolution,
    Level,
    MidBlock,
    ResnetBlock,
    TimeEmbedding,
    batch_invariant,
    module_list,
    norm_silu,
    same_size,
    sinusoidal_embedding,
)

__all__ = ["Labels", "UNet"]

Labels = int | Sequence[int] | Tensor | None

_MODEL_CARD = """\
---
{{ card_data }}
---

A diffusion U-Net saved by ddim_fast. `UNet.from_pretrained(FOLDER)` loads it;
`python -m ddim_fast.sample --model FOLDER` samples from it.
"""


class UNet(nn.Module, ModelHubMixin, library_name="ddim_fast", tags=["diffusion", "ddim"], model_card_template=_MODEL_CARD):
    """eps(x_t, t), or v or x_0 as ``config.prediction_type`` says.

    Args:
        config: the architecture, see :class:`UNetConfig`.

    Attributes:
        fitted_timesteps: the timesteps of spacing ``adaptive`` by solver and number of steps, if the checkpoint has any.
        fitted_coefficients: the rows of the solver ``fitted`` by number of steps, if the checkpoint has any.
        audio: the sound format of its images, for a network of sounds.
    """

    fitted_timesteps: dict[str, dict[int, list[int]]] | None = None
    fitted_coefficients: dict[int, list[list[float]]] | None = None
    audio: AudioConfig | None = None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise ValueError(f"UNet takes a UNetConfig, for example UNetConfig.preset('cifar10-64'); got {config!r}")
        self.config = config
        widths = config.level_channels
        time_dim = 4 * config.base_channels
        self.conv_in = Convolution(config.in_channels, widths[0], **same_size(config))
        self.time_embedding = TimeEmbedding(config.base_channels, time_dim)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes + 1, time_dim)

        self.down_blocks: list[Level] = module_list([])
        skips = [widths[0]]
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            inputs = [channels] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(
                Level(config, inputs, width, time_dim, config.attends(level), None if last else "downsamplers")
            )
            skips += [width] * (config.layers_per_block + (not last))
            channels = width
        self.mid_block = MidBlock(config, channels, time_dim)
        self.up_blocks: list[Level] = module_list([])
        for level, width in reversed(list(enumerate(widths))):
            inputs = [skips.pop() + (channels if i == 0 else width) for i in range(config.layers_per_block + 1)]
            self.up_blocks.append(
                Level(config, inputs, width, time_dim, config.attends(level), "upsamplers" if level else None)
            )
            channels = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv_out = Convolution(channels, config.in_channels, **same_size(config))
        self._initialise()

    def __repr__(self) -> str:
        """One line; ``nn.Module.__repr__(model)`` has one for each layer."""
        shape, numbers = "x".join(map(str, self.config.image_shape)), sum(p.numel() for p in self.parameters())
        classes = "" if self.config.num_classes is None else f"{self.config.num_classes} classes, "
        dtype = str(self.dtype).removeprefix("torch.")
        return f"UNet({shape}, {numbers:,} parameters, {classes}{self.config.prediction_type}, {dtype}, {self.device})"

    def forward(self, x: Tensor, timesteps: Tensor | Sequence[int] | int, labels: Labels = None) -> Tensor:
        """Predict the noise (or v, or x_0) in ``x``.

        Args:
            x: (N, C, H, W) noisy images.
            timesteps: (N,), or one for all images; the training timesteps, integers in [0, num_train_timesteps), of any number
                type.
            labels: (N,) int64 class labels, or one for all images; ``config.num_classes`` means "no label". None means no label
                for any image.

        Returns:
            (N, C, H, W) in the dtype of the network.
        """
        return self.denoise(x, self.condition(timesteps, labels))

    def condition(self, timesteps: Tensor | Sequence[int] | int, labels: Labels = None) -> Tensor:
        """The embeddings of timesteps and classes, projected for each residual block, which adds them to its channels. A
        sampler computes them once for all its steps.

        Args:
            timesteps: (N,), or one for all images.
            labels: (N,) int64, one or None, as in :meth:`forward`; may be longer than one-element ``timesteps``.

        Returns:
            (N, channels of all residual blocks), concatenated in the order of execution; N = 1 serves all images.
        """
        if not isinstance(timesteps, Tensor):
            timesteps = torch.as_tensor(timesteps, device=self.device)
        if labels is not None and not isinstance(labels, Tensor):
            labels = torch.as_tensor(labels, device=self.device)
        embedding = self.time_embedding(sinusoidal_embedding(timesteps.reshape(-1), self.config))
        if self.config.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given, but this network is unconditional")
        else:
            null = torch.full((embedding.shape[0],), self.config.num_classes, device=embedding.device)
            embedding = embedding + self.class_embedding(null if labels is None else labels)
        activated = F.silu(embedding)
        # The addition includes the bias of the convolution before it.
        return torch.cat([resnet.time_emb_proj(activated) + resnet.conv1.bias for resnet in self._resnets()], dim=1)

    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        """:meth:`forward` with the result of :meth:`condition`."""
        return self.denoise_reusing(x, condition)[0]

    def denoise_reusing(self, x: Tensor, condition: Tensor, deep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`denoise` with deep features of an earlier step, which change little from step to step (DeepCache, Ma, Fang and
        Wang 2024, arXiv 2312.00858).

        The shallow part is the first convolution, the last residual block, whose skip is that convolution's result, and the
        output layers: a tenth of the network. A shallow part of the whole first level, a third of the network, gave no better
        images with the packaged fashion-mnist.

        Args:
            x: (N, C, H, W) noisy images.
            condition: the result of :meth:`condition`.
            deep: the deep features of these images from an earlier call; None computes them.

        Returns:
            The prediction, as of :meth:`forward`; and the deep features, the input of the last residual block.
        """
        shifts = condition.expand(x.shape[0], -1).split([resnet.conv1.out_channels for resnet in self._resnets()], dim=1)
        skip = batch_invariant(self.conv_in, x, owner=self.conv_in)
        if deep is None:
            deep = self._deep_features(skip, shifts)
        last = self.up_blocks[-1]
        h = last.attend(-1, last.resnets[-1](deep, shifts[-1], skip))
        return batch_invariant(self.conv_out, norm_silu(self.conv_norm_out, h), owner=self.conv_out), deep

    def _deep_features(self, h: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
        """The layers between the first convolution and the last residual block."""
        following = iter(shifts)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = block.attend(i, resnet(h, next(following)))
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, next(following), next(following))
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                if len(skips) > 1:  # the last residual block takes the first one
                    h = block.attend(i, resnet(h, next(following), skips.pop()))
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return h

    def _resnets(self) -> Iterator[ResnetBlock]:
        """The residual blocks in the order of execution."""
        for _, block in self._levels():
            yield from block.resnets

    def _levels(self) -> Iterator[tuple[int, Level | MidBlock]]:
        """The blocks in the order of execution, each with its level; level 0 is the full resolution."""
        last = len(self.down_blocks) - 1
        yield from enumerate(self.down_blocks)
        yield last, self.mid_block
        for i, block in enumerate(self.up_blocks):
            yield last - i, block

    def blocks(self) -> Iterator[nn.Module]:
        """The residual blocks, attentions and resamplings, which hold nearly all parameters. Each is called as a module; of
        residual blocks, :meth:`condition` reads some parameters before."""
        for _, level in self._levels():
            for kind in level.children():
                yield from kind.children()

    def for_inference(self, dtype: torch.dtype, *, batch_invariant: bool = True) -> UNet:
        """A copy that computes in ``dtype``, its weights converted and laid out once for the fastest operators; autocast would
        convert them at each call. Embeddings and the norms' parameters stay float32, which they need; they are small.

        Args:
            dtype: the dtype of its input and output images: torch.float32, bfloat16 or float16.
            batch_invariant: whether a single image equals the same image in a batch to the last bit, in eager mode on a CPU.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        module: Any
        for module in model.modules():
            module.batch_invariant = batch_invariant
        for level, block in model._levels():
            for resnet in block.resnets:
                for convolution in (resnet.conv1, resnet.conv2):
                    convolution.prepare(dtype, size=self.config.level_size(level))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                if isinstance(module, Conv3x3) and module.prepared is None:
                    module.prepare(dtype)
                module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif isinstance(module, Attention):
                module.fold(dtype)
                for linear in (module.to_q, module.to_k, module.to_v, *module.to_out):
                    if linear is not None:
                        linear.to(dtype)
        return model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.conv_in.weight.dtype

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, config: UNetConfig | None = None, **hub_options: Any
    ) -> UNet:
        """Load a checkpoint, in eval mode, on the CPU, in float32. Nothing in it is ever executed.

        Args:
            pretrained_model_name_or_path: the name of a packaged model; a folder with config.json and model.safetensors; a
                folder of diffusers, of a UNet2DModel, DDPMPipeline or DDIMPipeline; a ``.ckpt`` file of the DDIM authors' code;
                or a Hugging Face Hub id (``owner/name``), the only form that downloads, without pickles.
            config: the network in a ``.ckpt`` file, which does not describe it. None derives it from the tensors' shapes.
            hub_options: for a Hub id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            FileNotFoundError: there is no such model, or a file of it is missing.
            ValueError: a file is damaged or does not belong to this architecture; the message names the file and the tensor.
        """
        path = local_model(pretrained_model_name_or_path, **hub_options)
        checkpoint = load_checkpoint(path, config)
        model = checkpoint.network(cls)
        model.fitted_timesteps = load_timesteps(path, model.config.num_train_timesteps)
        model.fitted_coefficients = load_coefficients(path) or None
        model.audio = load_audio(path, model.config)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(save_directory, self.config, self.state_dict(), self.audio)

    def _initialise(self) -> None:
        """Start every residual branch and the output at zero (Ho et al. 2020's code: init_scale = 0 for the last layer of each
        branch), so that the network starts as the identity on its input's scale."""
        for module in self.modules():
            if isinstance(module, (ResnetBlock, Attention)):
                last = module.conv2 if isinstance(module, ResnetBlock) else module.to_out[0]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)
        if self.config.num_classes is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
