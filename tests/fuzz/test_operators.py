"""Operators called with hostile tensors: each call is right, or is refused by name; none ends the process.

A file holds the number of a call. What it is called with follows from that."""

import json
import math
from random import Random

import pytest
import torch

from ddim_fast.ops.attention import attention, attention_reference
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_cached, conv3x3_reference, prepare_conv3x3
from ddim_fast.ops.ddim_step import ddim_step, ddim_step_reference
from ddim_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from tests.helpers.fuzzing import Fuzzer, main

# What the results of these dtypes may differ from float64 by, relative to the largest. Convolutions are Winograd's.
ERRORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

OTHER_DTYPES = (
    torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64,
)  # fmt: skip


class Wrapper(torch.Tensor):
    """A tensor that has no memory of its own."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.tensor, (args, kwargs or {}))
        return function(*inner[0], **inner[1])


def laid_out(random, t):
    """The same numbers elsewhere in memory, or in another way."""
    ways = [lambda: t.clone(), lambda: t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t]
    ways += [lambda: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) if t.numel() else t]  # not aligned
    ways += [lambda: torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t]
    ways += [lambda: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.ndim else t, lambda: t.detach().requires_grad_()]
    ways += [lambda: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.t().contiguous().t() if t.ndim == 2 else t]
    return random.choice(ways)()


def hostile(random, t):
    """Something else in its place."""
    ways = [
        lambda: None, lambda: t.tolist(), lambda: t.numpy(), lambda: "x", lambda: 3.0, lambda: t.to_sparse(),
        lambda: t.to_mkldnn() if t.dtype == torch.float32 and t.ndim and t.numel() else t, lambda: t.to("meta"),
        lambda: torch.nested.nested_tensor([t, t]), lambda: t.to(random.choice(OTHER_DTYPES)), lambda: t.flatten()[:1].sum(),
        lambda: t[None], lambda: t[:0] if t.ndim else t, lambda: t[..., :0] if t.ndim else t, lambda: t.flatten(),
        lambda: t.flatten(1) if t.ndim > 1 else t, lambda: t.flatten()[:1].expand(*t.shape[:-1], 2**40) if t.ndim else t,
        lambda: t.flatten()[:1].expand(2**33, *t.shape[1:]) if t.ndim else t, lambda: t.flatten()[:1].expand(t.shape),
        lambda: torch.cat((t, t), -1) if t.ndim else t, lambda: torch.cat((t, t), 0) if t.ndim else t, lambda: Wrapper(t),
        lambda: t[..., :-1] if t.ndim else t, lambda: t.transpose(0, -1) if t.ndim else t, lambda: t * 10,
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), lambda: t.to_sparse_csr() if t.ndim == 2 else t,
        lambda: t.flatten()[:1].as_strided(t.shape, [0] * t.ndim), lambda: torch.full_like(t, 30),
    ]  # fmt: skip
    while True:
        try:
            return random.choice(ways)()
        except RuntimeError:  # of no such tensor
            continue


def group_norm_call(random, tensor):
    n, c, h, w = random.randrange(3), 8 * random.randrange(1, 4), random.randrange(6), random.randrange(1, 6)
    skip = random.choice((0, 0, 8))
    names = dict.fromkeys(("pre_shift", "scale", "shift"), (n, c + skip)) | {"residual": (n, c + skip, h, w)}
    options = {name: tensor(*shape) for name, shape in names.items() if random.random() < 0.3}
    options |= {"skip": tensor(n, skip, h, w)} if skip else {}
    tensors = {"x": tensor(n, c, h, w), "weight": tensor(c + skip), "bias": tensor(c + skip), **options}
    groups = random.choice((4, 4, 4, 8, 1, 0, -1, 3, 2.0, "4", None, 2**70))
    return tensors, {
        "num_groups": groups,
        "eps": random.choice((1e-5, 1e-5, 0, -1, math.nan, "x")),
        "silu": random.random() < 0.5,
    }


def attention_call(random, tensor):
    n, heads, dim = random.randrange(1, 3), random.randrange(1, 3), random.choice((1, 4, 16))
    tokens, keys = random.randrange(5), random.randrange(5)
    tensors = {"query": tensor(n, heads, tokens, dim), "key": tensor(n, heads, keys, dim), "value": tensor(n, heads, keys, dim)}
    return tensors, {"scale": random.choice((None, None, 0.5, math.nan, "x"))}


def conv_call(random, tensor):
    n, c, k = random.randrange(3), 16 * random.randrange(1, 3), 16 * random.randrange(1, 3)
    h, w, upsample = random.randrange(1, 9), random.randrange(1, 9), random.random() < 0.3
    kernel = (3, 3) if random.random() < 0.9 else (1, 3)
    h = h if kernel[0] == 3 else 1
    grown = (n, k, h * (2 if upsample and kernel[0] == 3 else 1), w * (2 if upsample else 1))
    tensors = {"x": tensor(n, c, h, w), "weight": tensor(k, c, *kernel)}
    tensors |= {"bias": tensor(k)} if random.random() < 0.5 else {}
    tensors |= {"residual": tensor(*grown)} if random.random() < 0.4 else {}
    return tensors, {"upsample": upsample}


def step_call(random, tensor):
    shape = [random.randrange(1, 4) for _ in range(random.randrange(5))]
    names = ["sample", "model_output", *(name for name in ("noise", "unconditional", "out") if random.random() < 0.3)]
    tensors = {name: tensor(*shape) for name in names}
    options = {"guidance": 2.0} if "unconditional" in tensors else {}
    options |= {"clip": random.choice((None, 1.0, 0.5, -1, math.nan, "x"))}
    table = tensor(3, 7)
    options["coefficients"] = random.choice(
        ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],) * 4 + ([1.0], table, table[:, ::2], None, [None] * 7)
    )
    if options["coefficients"] is table:
        options["step"] = torch.tensor(random.choice((0, 2, 3, -1)))
    if "noise" not in tensors and shape and random.random() < 0.3:
        seeds = torch.arange(shape[0])
        options["seeds"] = random.choice(
            (seeds, seeds, seeds.float(), seeds[:-1], seeds.to("meta"), torch.arange(0), seeds.tolist())
        )
    if "out" in tensors and random.random() < 0.4 and tensors["sample"].numel():  # it lies over an input
        memory = torch.cat((tensors["sample"].flatten(), tensors["sample"].flatten()[:1]))
        tensors["sample"], tensors["out"] = (
            memory[:-1].view(shape),
            memory[random.randrange(2) :][: len(memory) - 1].view(shape),
        )
    return tensors, options


def call_of(make, number):
    """The arguments of a call by name, its tensors and its other ones, most of them as they should be."""
    random = Random(number)
    torch.manual_seed(random.randrange(2**32))
    dtype = random.choice((torch.float32,) * 4 + (torch.bfloat16, torch.float16, torch.float64))
    tensors, options = make(random, lambda *shape: torch.randn(shape).to(dtype))
    clean = random.random() < 0.3
    for name in tensors:
        if random.random() < 0.5 and name not in ("out",):
            tensors[name] = laid_out(random, tensors[name])
    if not clean:
        name = random.choice(list(tensors))
        tensors[name] = hostile(random, tensors[name].detach())
    return tensors, options


def plain(value):
    """In float64, in memory of its own, where it is a dense tensor."""
    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
    if not is_dense or type(value) is Wrapper or value.device.type == "meta" or not value.is_floating_point():
        return value
    return value.detach().double().resolve_neg().contiguous().clone() if value.numel() < 10**6 else value


def fuzzer(operator, make, run, reference, name=None):
    def read(path):
        number = json.loads(path.read_bytes())["number"]
        if number == 0:  # the file as it was written
            return
        tensors, options = call_of(make, number)
        if operator == "attention" and any(isinstance(t, torch.Tensor) and t.numel() > 10**9 for t in tensors.values()):
            return  # PyTorch's own function computes it, for hours
        expected = None
        try:
            with torch.no_grad():
                wide = {name: plain(value) for name, value in tensors.items() if name != "out"}
                expected = reference(**wide, **{name: plain(value) for name, value in options.items()})
        except Exception:  # it is for the operator to say what is wrong
            pass
        try:
            found, refusal = run(**tensors, **options), None
        except (TypeError, ValueError) as error:
            assert str(error).startswith(f"{operator}: "), f"an error that names no operator: {error!r}"
            told = [*tensors, *options, "seeds", "sample", "coefficients", "step"]
            assert any(name in str(error) for name in told), f"an error that names no argument: {error!r}"
            refusal = type(error)(str(error))  # without what was behind it, which may be a lack of memory
        except RuntimeError as error:
            if "allocate memory" in str(error) or "Storage size calculation overflowed" in str(error):
                return  # as of PyTorch's own operators
            raise
        if refusal is not None:
            raise refusal
        if isinstance(expected, torch.Tensor) and type(found) is torch.Tensor and found.device.type == "cpu":
            assert found.shape == expected.shape
            error = (found.detach().double() - expected.double()).abs()
            scale = expected.double().abs().nan_to_num(0, 0, 0).amax().clamp(min=1) if expected.numel() else 1
            dtypes = {t.dtype for t in tensors.values() if isinstance(t, torch.Tensor)}
            allowed = max(ERRORS.get(dtype, 0.2) for dtype in dtypes if dtype.is_floating_point)
            wrong = (error > allowed * scale) | (found.isnan() & ~expected.isnan())
            assert not wrong[expected.abs() < 1e20].any(), f"wrong by {error.max()}, of {scale}"

    def write(folder):
        (folder / "call.json").write_text('{"number": 0}')
        return [folder / "call.json"]

    def mutate(random, data):
        return json.dumps({"number": random.getrandbits(64)}).encode()

    return Fuzzer(name or operator, write, read, mutate, refusals=(TypeError,), names_file=False)


def run_prepared(x, weight, bias=None, *, residual=None, upsample=False):
    """A convolution with weights prepared for it, where they are tensors that can be."""
    prepared = None
    if (
        isinstance(weight, torch.Tensor)
        and isinstance(x, torch.Tensor)
        and weight.layout == torch.strided
        and not weight.is_nested
    ):
        dtype = x.dtype if x.dtype.is_floating_point else torch.float32
        prepared = prepare_conv3x3(weight, dtype, size=None if upsample or x.ndim != 4 else tuple(x.shape[2:]))
    return conv3x3(x, weight, bias, residual=residual, upsample=upsample, prepared=prepared)


FUZZERS = (
    fuzzer("group_norm_silu", group_norm_call, group_norm_silu, group_norm_silu_reference),
    fuzzer("attention", attention_call, attention, attention_reference),
    fuzzer("conv3x3", conv_call, run_prepared, conv3x3_reference),
    fuzzer("conv3x3", conv_call, conv3x3_cached, conv3x3_reference, "conv3x3_cached"),
    fuzzer("ddim_step", step_call, ddim_step, ddim_step_reference),
)


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda fuzzer: fuzzer.name)
def test_hostile_tensors(fuzzer):
    fuzzer.check(150)


if __name__ == "__main__":
    main(*FUZZERS)
