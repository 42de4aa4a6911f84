"""The feature network of FID, KID and precision/recall: Inception v3 as TensorFlow published it on 2015-12-05."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import inference
from ..io.files import errors_name_file
from ..models.weights import is_dense, is_state_dict, read_pickle, read_safetensors, read_shards, read_weights

__all__ = [
    "FEATURES",
    "NAME",
    "WEIGHTS_SHA256",
    "FeatureNetwork",
    "Inception",
    "load_inception",
    "resize_bilinear",
    "tensors_checksum",
]

# The name in files of the weights below, and of no others.
NAME = "inception-2015-12-05"
WEIGHTS_SHA256 = "d8480bf241861ef02daadaae6cbf012cd62f9ea434caf5d56c3494221d2a7c1f"
# The file of pytorch-fid and torch-fidelity, another conversion of TensorFlow's.
_PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FEATURES = 2048

_SIZE = 299

# Other tensors in published files: the classifier, for the Inception Score, and bookkeeping of training.
_IGNORED = ("fc.", "AuxLogits.")


class FeatureNetwork(nn.Module):
    """The features of pictures: all steps of the measure before the statistics.

    Args:
        network: (N, 3, 299, 299) float32 in about [-1, 1] -> (N, features).
        name: its name in files, one per set of weights. Results and cached statistics are found by it, and statistics of
            networks with different names are never compared.
        features: their number.
        size: height and width of the resized pictures.
    """

    def __init__(self, network: nn.Module, name: str = NAME, features: int = FEATURES, size: int = _SIZE) -> None:
        super().__init__()
        self.network, self.name, self.features, self.size = network.eval(), name, features, size
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """The features of (N, C, H, W) uint8 pictures, grey or RGB: (N, features) float32."""
        return self._see(self._resized(pictures))

    def of(self, pictures: Tensor | Iterable[Tensor], batch_size: int = 64) -> Tensor:
        """The features of many pictures, ``batch_size`` at once: (N, C, H, W), or an iterable of (C, H, W) in any sizes."""
        if isinstance(pictures, Tensor):
            return torch.cat([self(batch) for batch in pictures.split(batch_size)])
        resized = (self._resized(picture[None]) for picture in pictures)
        batches = iter(lambda: list(itertools.islice(resized, batch_size)), [])
        return torch.cat([self._see(torch.cat(batch)) for batch in batches])

    @inference()
    def _resized(self, pictures: Tensor) -> Tensor:
        """The network's input for (N, C, H, W) pictures: (N, 3, size, size) in [-1, 1]."""
        x = pictures.to(next(self.network.parameters()).device).float().expand(-1, 3, -1, -1)
        return (resize_bilinear(x, self.size) - 128) / 128

    @inference()
    def _see(self, x: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn  # full float32 precision, as on a CPU
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            return self.network(x.contiguous(memory_format=torch.channels_last)).float()


class Inception(nn.Module):
    """Inception v3 (Szegedy et al. 2015) up to its last average pool, in the variant of TensorFlow's
    ``classify_image_graph_def.pb`` (2015-12-05), which FID is defined by (Heusel et al. 2017). It differs from torchvision's:
    average pools do not count the padding, the last block pools by the maximum, and BatchNorm's eps is 1e-3.

    Modules have the names that torchvision, pytorch-fid and torch-fidelity give them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _MixedA(192, 32)
        self.Mixed_5c = _MixedA(256, 64)
        self.Mixed_5d = _MixedA(288, 64)
        self.Mixed_6a = _MixedB(288)
        self.Mixed_6b = _MixedC(768, 128)
        self.Mixed_6c = _MixedC(768, 160)
        self.Mixed_6d = _MixedC(768, 160)
        self.Mixed_6e = _MixedC(768, 192)
        self.Mixed_7a = _MixedD(768)
        self.Mixed_7b = _MixedE(1280, _average)
        self.Mixed_7c = _MixedE(2048, _maximum)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 299, 299) in [-1, 1] -> (N, 2048), what TensorFlow calls ``pool_3``."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))


class _Conv(nn.Module):
    """Convolution, BatchNorm, ReLU. :meth:`fold` merges the fixed norm into the convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold(self) -> None:
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        folded = nn.Conv2d(1, 1, 1)  # any shape: both parameters are replaced
        folded.__dict__.update({k: v for k, v in self.conv.__dict__.items() if not k.startswith("_")})
        folded.weight = nn.Parameter((self.conv.weight.double() * scale[:, None, None, None]).float())
        folded.bias = nn.Parameter((bn.bias.double() - bn.running_mean.double() * scale).float())
        self.conv, self.bn = folded, nn.Identity()


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class _MixedA(nn.Module):
    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 64, 1)
        self.branch5x5_1 = _Conv(channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))], 1)


class _MixedB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _MixedC(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        wide, high = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(channels, 192, 1)
        self.branch7x7_1 = _Conv(channels, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, **wide)
        self.branch7x7_3 = _Conv(inner, 192, **high)
        self.branch7x7dbl_1 = _Conv(channels, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, **high)
        self.branch7x7dbl_3 = _Conv(inner, inner, **wide)
        self.branch7x7dbl_4 = _Conv(inner, inner, **high)
        self.branch7x7dbl_5 = _Conv(inner, 192, **wide)
        self.branch_pool = _Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _MixedD(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class _MixedE(nn.Module):
    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 320, 1)
        self.branch3x3_1 = _Conv(channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(channels, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self._pool(x))]
        return torch.cat(parts, 1)


def load_inception(path: Path, name: str | None = None) -> FeatureNetwork:
    """The network with the published weights, on the CPU, in eval mode.

    Args:
        path: a folder with ``inception-2015-12-05.safetensors.index.json`` and its shards, or with one ``.safetensors`` file of
            that name; such a file itself; or the ``.pth`` of pytorch-fid or torch-fidelity; only its tensors are read.
        name: a name for weights other than the published ones, which are refused without it. Their checksum becomes part of the
            network's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged or is of another network; the message names the file and the tensor. Or the weights are
            not the published ones and have no name.
    """
    tensors = _read(path)
    with torch.device("meta"):
        network = Inception()
    expected = network.state_dict()
    tensors = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(_IGNORED) and not key.endswith("num_batches_tracked")
    }
    keys = {key for key in expected if not key.endswith("num_batches_tracked")}
    with errors_name_file(path):
        for key in sorted(keys ^ tensors.keys()):
            raise ValueError(f"{'unexpected' if key in tensors else 'missing'} tensor {key!r}: not the FID Inception network")
        for key, tensor in tensors.items():
            if tensor.shape != expected[key].shape or not is_dense(tensor):
                raise ValueError(
                    f"tensor {key!r} is no array of floating-point numbers of shape {tuple(expected[key].shape)}; "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {key!r} is not finite")
    tensors = {key: tensor.detach().float() for key, tensor in tensors.items()}
    identity = _identity(path, tensors, name)
    network.load_state_dict(tensors, assign=True, strict=False)
    for module in list(network.modules()):
        if isinstance(module, _Conv):
            module.fold()
    return FeatureNetwork(network.to(memory_format=torch.channels_last), identity)  # type: ignore[call-overload]


def tensors_checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all names, shapes and values, in hexadecimal, independent of the file format."""
    digest = hashlib.sha256(json.dumps({name: list(t.shape) for name, t in sorted(tensors.items())}).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _identity(path: Path, tensors: dict[str, Tensor], name: str | None) -> str:
    """The name of the network with these weights: a user's name includes the checksum, since any file with the same tensors
    would fit it."""
    checksum = tensors_checksum(tensors)
    if checksum == WEIGHTS_SHA256 or (path.suffix == ".pth" and hashlib.sha256(path.read_bytes()).hexdigest() == _PTH_SHA256):
        return NAME
    if name is None:
        raise ValueError(
            f"{path}: not the published weights of {NAME} (sha256 {checksum[:16]}, not {WEIGHTS_SHA256[:16]}); "
            f"to measure with them, name them: --inception NAME={path}"
        )
    return f"{name} sha256:{checksum[:16]}"


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return read_weights(path, NAME)[1]
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if path.name.endswith(".index.json"):
        return read_shards(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = read_pickle(path)
    if not is_state_dict(state):
        raise ValueError(f"{path}: not a file of a network's tensors; name the weights of the FID Inception network")
    return state


def resize_bilinear(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size), as ``tf.image.resize_bilinear`` of TensorFlow 1 does by default: output pixel i is
    read at i * H / size, without half-pixel centres and without a filter. It is a matrix product for each axis."""
    for _ in range(2):  # the last axis first
        x = (x @ _interpolation(x.shape[-1], size, x.device)).transpose(-1, -2)
    return x


def _interpolation(before: int, after: int, device: torch.device) -> Tensor:
    """(before, after) float32: the weight of each input pixel in each output pixel."""
    position = np.arange(after, dtype=np.float32) * np.float32(before / after)  # as in TensorFlow
    low = np.floor(position).astype(np.int64)
    share = position - low.astype(np.float32)
    weights = np.zeros((before, after), np.float32)
    column = np.arange(after)
    np.add.at(weights, (low, column), 1 - share)
    np.add.at(weights, (np.minimum(low + 1, before - 1), column), share)
    return torch.from_numpy(weights).to(device)
