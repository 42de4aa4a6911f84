"""Recorded runs on a CPU: what is recorded, how it is computed, and what a plan refuses."""

from __future__ import annotations

import threading
from random import Random

import pytest
import torch
import torch.nn.functional as F

from ddim_fast import Sampler
from ddim_fast.engine.captured_cpu import CapturedOnCpu
from ddim_fast.engine.plan import Buffer, Call, NotRecorded, View, _share_memory
from ddim_fast.io.progress import watch
from ddim_fast.ops import native
from ddim_fast.ops.ddim_step import ddim_step
from ddim_fast.ops.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.why_not))

LAST = torch.channels_last
BF16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(not (native.module and native.module.conv3x3_has_bf16()), reason="no bf16"),
)
DTYPES = [pytest.param(torch.float32, id="fp32"), BF16]


def captured(function, *inputs, engine=None):
    """``function`` of tensors as a plan computes it, its memory full of NaN before."""
    engine = CapturedOnCpu() if engine is None else engine
    with torch.no_grad():
        result = engine.run(_apply, inputs, function)
        for recording in engine.recordings.values():
            recording.plan._memory.fill_(0xFF)
        again = engine.run(_apply, inputs, function)
    assert torch.equal(result.nan_to_num(), again.nan_to_num())
    return again


def _apply(engine, inputs, function):
    return function(*inputs)


def assert_as_exact_as_pytorch(function, *inputs):
    """No more than twice the error of PyTorch in the same precision, and no less than rounding."""
    with torch.no_grad():
        plain, ours = function(*inputs), captured(function, *inputs)
        exact = function(*(t.double() for t in inputs)) if inputs[0].dtype.is_floating_point else plain
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * max((plain.double() - exact).abs().max(), rounding)
    return ours


def random(*shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype, memory_format=layout) if values.ndim == 4 else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,depth,columns", [(1, 1, 1), (7, 3, 5), (64, 64, 64), (100, 130, 70), (513, 96, 192), (5, 1000, 17)]
)
def test_linear_layers(rows, depth, columns, dtype):
    weight, bias = random(columns, depth, seed=1) / depth**0.5, random(columns, seed=2)
    x, residual = random(rows, depth, dtype=dtype), random(rows, columns, dtype=dtype, seed=3)
    assert_as_exact_as_pytorch(lambda x, y: y + F.linear(x, weight.to(x.dtype), bias.to(x.dtype)), x, residual)
    assert_as_exact_as_pytorch(lambda x, y: F.linear(x, weight.to(x.dtype)) + y, x, residual)
    assert_as_exact_as_pytorch(lambda x: F.linear(x, weight.to(x.dtype)), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,height,width,channels,out", [(2, 8, 8, 3, 16), (1, 7, 5, 32, 3), (3, 1, 12, 8, 24), (1, 4, 4, 1, 1)]
)
@pytest.mark.parametrize(
    "kernel,stride,padding", [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 3), (1, 2), (0, 1))]
)
def test_convolutions(n, height, width, channels, out, kernel, stride, padding, dtype):
    weight, bias = random(out, channels, *kernel, seed=1) / (3 * channels**0.5), random(out, seed=2)
    x = random(n, channels, height, width, dtype=dtype, layout=LAST)
    assert_as_exact_as_pytorch(lambda x: F.conv2d(x, weight.to(x), bias.to(x), stride=stride, padding=padding), x)
    if stride == (2, 2) and min(height, width) > 1:  # padded on the right and below, as the paper's networks do it
        ours = assert_as_exact_as_pytorch(lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight.to(x), bias.to(x), stride=2), x)
        assert ours.shape[2:] == ((height + 1 - 3) // 2 + 1, (width + 1 - 3) // 2 + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,heads,queries,keys,dim",
    [
        (1, 1, 16, 16, 64),
        (2, 4, 64, 64, 32),
        (3, 1, 100, 77, 40),
        (1, 2, 256, 256, 128),
        (1, 1, 3, 2, 5),
        (1, 1, 1024, 1024, 8),
    ],
)
def test_attention(n, heads, queries, keys, dim, dtype):
    tokens = [random(n, count, heads, dim, dtype=dtype, seed=seed) for seed, count in enumerate((queries, keys, keys))]
    q, k, v = (t.transpose(1, 2) for t in tokens)
    attend = F.scaled_dot_product_attention
    assert_as_exact_as_pytorch(lambda q, k, v: attend(3 * q, k, v), q, k, v)
    assert_as_exact_as_pytorch(lambda q, k, v: attend(q, k, v, scale=0.3).transpose(1, 2).flatten(2), q, k, v)


def test_attention_to_one_of_many_tokens():
    """Scores of 100 and more: their exponentials overflow unless the greatest is taken away first."""
    q, k, v = (30 * random(1, 1, 32, 16, seed=seed) for seed in range(3))
    assert_as_exact_as_pytorch(F.scaled_dot_product_attention, q, k, v)


ARITHMETIC = {
    "add": lambda a, b, c: a + b,
    "add a multiple": lambda a, b, c: torch.add(a, b, alpha=-0.5),
    "sub": lambda a, b, c: a - b,
    "sub from a number": lambda a, b, c: 1.5 - a,
    "mul": lambda a, b, c: a * c,
    "div": lambda a, b, c: a / (2 + c * c),
    "clamp": lambda a, b, c: a.clamp(-0.5, 0.7),
    "clamp from below": lambda a, b, c: a.clamp(min=0.1),
    "lerp": lambda a, b, c: a.lerp(b, c[:1, :1, :1, :1]),
    "lerp beyond": lambda a, b, c: a.lerp(b, torch.tensor(3.5)),
    "addcmul": lambda a, b, c: torch.addcmul(a, b, c, value=0.4),
    "cat": lambda a, b, c: torch.cat([a, b, a], dim=1),
    "chunks": lambda a, b, c: torch.cat([a, b]).chunk(2)[1] - a,
    "layout": lambda a, b, c: a.to(memory_format=LAST) + b.contiguous(),
    "to a narrow dtype": lambda a, b, c: a.to(torch.bfloat16).float() + b,
    "in place": lambda a, b, c: a.clone().mul_(2).add_(b),
    "zeros": lambda a, b, c: torch.zeros_like(a) + b,
    "one number an image": lambda a, b, c: a * b[:, :1, :1, :1],
    "enlarge": lambda a, b, c: F.interpolate(a.to(memory_format=LAST), scale_factor=2.0, mode="nearest"),
    "pad": lambda a, b, c: F.pad(a, (1, 2, 0, 1)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, layout):
    inputs = [random(3, 5, 7, 9, layout=layout, seed=seed) for seed in range(3)]
    function = ARITHMETIC[name]
    torch.testing.assert_close(captured(function, *inputs), function(*inputs), atol=2e-7, rtol=2e-7)


def test_nan_stays_nan():
    x = torch.tensor([1.0, float("nan"), -5.0] * 11)
    result = captured(lambda x: x.clamp(-2, 2) + 0, x)
    assert torch.equal(result.isnan(), x.isnan()) and result[2] == -2


def test_rows_of_a_table_by_numbers_that_change():
    table, engine = random(6, 4, 3), CapturedOnCpu()
    for index in ([0, 5, 2], [1, 1, 4]):
        index = torch.tensor(index)
        for rows in (table, table[:, 1:3], table[:, :1, :2]):
            expected = rows.index_select(0, index)
            assert torch.equal(captured(_second_of_pair, rows, index, engine=engine), expected)
    with pytest.raises(IndexError, match="an index lies outside its table"):
        engine.run(_apply, (table, torch.tensor([0, 6, 1])), _second_of_pair)
    assert torch.equal(engine.run(_apply, (table, torch.tensor([3, 3, 3])), _second_of_pair), table[[3, 3, 3]])


def _second_of_pair(rows, index):
    return rows.index_select(0, index)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_step_takes_the_row_that_its_number_names(noisy):
    x, output, table, seeds = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1), random(5, 7, seed=2).abs(), torch.tensor([4, 9])
    engine = CapturedOnCpu()

    def step(x, output, table, index, seeds):
        return ddim_step(x, output, table, 0.8, seeds=seeds if noisy else None, step=index)

    for i in (3, 0, 4):
        index = torch.tensor(i)
        assert torch.equal(captured(step, x, output, table, index, seeds, engine=engine), step(x, output, table, index, seeds))
    with pytest.raises(IndexError, match="a step's number lies outside its table"):
        captured(step, x, output, table, torch.tensor(5), seeds, engine=engine)


def test_what_only_depends_on_weights_is_computed_once():
    weight, shift = random(16, 16), random(16, seed=1)
    engine = CapturedOnCpu()
    x = random(4, 16)
    function = lambda x: F.linear(x, weight * 2, shift + 1)  # noqa: E731
    captured(function, x, engine=engine)
    (recording,) = engine.recordings.values()
    assert [call[0] for call in recording.plan.calls] == ["product"]


def test_a_constant_of_every_step_is_computed_once(small_unet):
    """A residual block with a shortcut adds up two biases."""
    counts = []
    for steps in (1, 5):
        sampler = Sampler(small_unet, steps=steps, engine="captured")
        sampler.sample(seeds=[0])
        (recording,) = sampler._engine.recordings.values()
        counts.append(sum(buffer.kind == "weight" for buffer in recording.plan.buffers))
    assert counts[0] == counts[1]


def test_weights_that_one_recording_made_are_not_taken_for_another_ones():
    """The sum of two biases lives as long as its recording; the next one's may lie at the same address."""
    weight, engine, x = random(16, 16), CapturedOnCpu(), random(4, 16)
    for i in range(3 * CapturedOnCpu.MOST):
        bias = random(16, seed=i).bfloat16()
        function = lambda x, bias=bias: F.linear(x, weight, bias.float() + i)  # noqa: B023, E731
        torch.testing.assert_close(captured(function, x, engine=engine), function(x))
    assert len(engine._derived) <= 2 + CapturedOnCpu.MOST


def test_what_the_result_does_not_need_is_left_out_and_sums_are_joined():
    weight = random(16, 16)
    engine = CapturedOnCpu()

    def function(x):
        torch.cat([x, x])
        return x + F.linear(x, weight)

    captured(function, random(4, 16), engine=engine)
    (recording,) = engine.recordings.values()
    assert [call[0] for call in recording.plan.calls] == ["product"]


def test_a_product_stays_where_what_it_reads_is_written_afterwards():
    weight, x = random(16, 16), random(4, 16)

    def function(x):
        x = x * 2
        y = F.linear(x, weight)
        x.mul_(3)
        return x + y

    torch.testing.assert_close(captured(function, x), function(x))


def test_padding_is_not_left_to_a_convolution_of_an_image_that_was_written_since():
    weight, x = random(8, 16, 3, 3), random(1, 16, 6, 6, layout=LAST)

    def function(x, change):
        x = x * 1
        padded = F.pad(x, (0, 1, 0, 1))
        change(x, padded)
        return F.conv2d(padded, weight, stride=2)

    for change in (lambda x, padded: None, lambda x, padded: x.mul_(2), lambda x, padded: padded.mul_(2)):
        expected = function(x, change)
        found = captured(lambda x, change=change: function(x, change), x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_result_that_nothing_computes_is_an_error():
    with pytest.raises(NotRecorded, match="must compute its result"):
        captured(lambda x: x[1:], torch.ones(4))


def test_a_product_that_others_read_is_not_joined_with_one_sum():
    weight = random(16, 16)
    x = random(4, 16)

    def function(x):
        y = F.linear(x, weight)
        return (x + y) * y

    assert torch.equal(captured(function, x), captured(lambda x: (x * 1 + F.linear(x, weight)) * F.linear(x, weight), x))


@pytest.mark.parametrize(
    "function,name",
    [
        (lambda x: x.tanh(), "aten.tanh"),
        (lambda x: x * float(x[0]), "aten._local_scalar_dense"),
        (lambda x: x.double() + 1, "torch.float64"),
        (lambda x: x @ x.T, "a product of two tensors"),
    ],
)
def test_what_cannot_be_recorded_is_named(function, name):
    with pytest.raises(NotRecorded, match=f"^{name}.* cannot be part of a captured run on a CPU; choose the eager"):
        captured(function, torch.ones(6, 6)[0] if "scalar" in name else torch.ones(6, 6))


def test_buffers_that_live_at_once_do_not_overlap():
    random_numbers = Random(0)
    for _ in range(200):
        buffers = [Buffer("scratch", random_numbers.randrange(0, 1000), None) for _ in range(random_numbers.randrange(1, 40))]
        calls = []
        for i, buffer in enumerate(buffers):
            reads = [View(b, 0) for b in random_numbers.sample(buffers[:i], min(i, 2))]
            calls.append(Call("elementwise", list(reads), View(buffer, 0), [], []))
        size = _share_memory(calls, View(buffers[-1], 0))
        first = {b: i for i, b in enumerate(buffers)}
        last = {
            b: max([i] + [j for j, c in enumerate(calls) if any(v.buffer is b for v in c.reads)]) for i, b in enumerate(buffers)
        }
        last[buffers[-1]] = len(calls)
        for i, a in enumerate(buffers):
            assert a.segment == 0 and a.offset % 64 == 0 and a.offset + a.bytes <= size
            for b in buffers[:i]:
                at_once = first[a] <= last[b] and first[b] <= last[a]
                apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
                assert apart or not at_once or not a.bytes or not b.bytes
        assert size <= sum(-(-max(b.bytes, 1) // 64) * 64 for b in buffers)


def test_memory_is_no_more_than_what_lives_at_once():
    """A chain of layers needs two buffers, however long it is."""
    weight, sizes = random(64, 64), []
    for layers in (2, 20):
        engine = CapturedOnCpu()

        def chain(x, layers=layers):
            for _ in range(layers):
                x = F.linear(x, weight)
            return x

        captured(chain, random(32, 64), engine=engine)
        (recording,) = engine.recordings.values()
        sizes.append(recording.plan.bytes)
    assert sizes[0] == sizes[1] == 2 * 32 * 64 * 4


# ---- Whole runs ----


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.int8, id="int8")])
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(dtype, small_unet):
    if dtype == torch.int8 and not native.module.conv3x3_has_int8():
        pytest.skip("this processor has no 8-bit products")
    sampler = Sampler(small_unet, steps=3, engine="captured", dtype=dtype, solver="unipc")
    request = {"labels": 3, "guidance": 2.0}
    images = sampler.sample(seeds=range(5), **request)
    assert torch.equal(sampler.sample(seeds=range(5), batch_size=2, **request), images)
    alone = torch.cat([sampler.sample(seeds=[seed], **request) for seed in range(5)])
    assert torch.equal(alone, images)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(sampler.sample(seeds=range(5), **request), images)
    finally:
        torch.set_num_threads(threads)


def test_a_recording_outlives_inference_mode(small_unet):
    sampler, expected = Sampler(small_unet, steps=2, engine="captured"), Sampler(small_unet, steps=2)
    with torch.inference_mode():
        sampler.sample(seeds=[1, 2])
    torch.testing.assert_close(sampler.sample(seeds=[3, 4]), expected.sample(seeds=[3, 4]), atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(sampler.sample(seeds=[5, 6]), expected.sample(seeds=[5, 6]), atol=1e-4, rtol=1e-4)


def test_threads_take_turns(small_unet):
    sampler = Sampler(small_unet, steps=3, engine="captured")
    expected = [sampler.sample(seeds=[seed, seed + 1]) for seed in range(6)]
    results: dict[int, torch.Tensor] = {}

    def sample(seed):
        for _ in range(3):
            results[seed] = sampler.sample(seeds=[seed, seed + 1])

    workers = [threading.Thread(target=sample, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[seed], images) for seed, images in enumerate(expected))


def test_progress_is_told_step_by_step(small_unet):
    sampler, told = Sampler(small_unet, steps=4, engine="captured"), []
    for _ in range(2):
        told.clear()
        with watch(lambda images, evaluations: told.append((images, evaluations))):
            sampler.sample(seeds=range(3))
        assert told == [(0.75, 1)] * 4


def test_the_recording_that_was_not_used_for_the_longest_time_is_dropped(small_unet):
    sampler = Sampler(small_unet, steps=1, engine="captured")
    for count in range(1, CapturedOnCpu.MOST + 3):
        sampler.sample(seeds=range(count))
    assert len(sampler._engine.recordings) == CapturedOnCpu.MOST
    assert sampler.sample(seeds=[0]).isfinite().all()


@pytest.mark.slow
def test_many_runs_leak_nothing(small_unet):
    sampler = Sampler(small_unet, steps=2, engine="captured")
    sampler.sample(seeds=[0])

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for seed in range(500):
        sampler.sample(seeds=[seed])
    before = resident()
    for seed in range(3000):
        sampler.sample(seeds=[seed])
    assert resident() - before < 4 << 20


# ---- Plans that are none ----

SEGMENTS = [(1 << 12, True), (1 << 12, False)]
NORM = ("group_norm_silu", [(1, 0), (-1, 0), (-1, 0), (0, 0), (1, 0), (1, 64), (-1, 0), (-1, 0), (-1, 0)])
PRODUCT = ("product", [(1, 0), (1, 0), (-1, 0), (-1, 0), (0, 0)], [0, 4, 1, 1, 8, 1, 1, 8, 1, 1, 1, 1, 0, 0], [])
GATHER = ("gather", [(1, 0), (1, 0), (0, 0)], [4, 16, 16, 2], [])
ADD = ("elementwise", [(1, 0), (1, 0), (0, 0)], [2, 1, 1, 1, 64, *[0, 0, 0, 0, 1] * 3], [1.0, 0.0])
ATTENTION = ("attention", [(1, 0), (1, 0), (1, 0), (0, 0)], [0, 1, 1, 8, 8, 8, *[0, 0, 8] * 4], [0.5])
CALLS = [
    ("conv3x3", [(1, 0), (1, 0), (-1, 0), (-1, 0), (0, 0)], [0, 0, 1, 4, 4, 16, 16, 0, 2], []),
    (*NORM, [0, 1, 16, 0, 8, 4, 0, 1, 1], [1e-5]),
    PRODUCT,
    ATTENTION,
    ("ddim_step", [(1, 0), (1, 0), (-1, 0), (-1, 0), (1, 0), (1, 0), (0, 0)], [0, 0, 0, 64, 32, 1], [1.0]),
    ADD,
    GATHER,
]
BIG = [(1 << 16, True), (1 << 16, False)]


def edited(call, buffers=(), integers=(), reals=()):
    name, *lists = call
    lists = [list(values) for values in lists]
    for values, changes in zip(lists, (buffers, integers, reals), strict=True):
        for place, value in changes:
            values[place] = value
    return (name, *lists)


@pytest.mark.parametrize(
    "call,reason",
    [
        (("tanh", [], [], []), "there is no such operator"),
        (("gather", [], [4, 16, 16, 2], []), "buffers are missing"),
        (("gather", GATHER[1], [4, 16, 16], []), "integers are missing"),
        (("gather", GATHER[1], [4, 16, 16, 2, 0], []), "there are too many arguments"),
        (("elementwise", ADD[1], ADD[2], [1.0]), "numbers are missing"),
        (edited(GATHER, buffers=[(0, (-1, 0))]), "a buffer is missing"),
        (edited(GATHER, buffers=[(0, (2, 0))]), "a segment is missing"),
        (edited(GATHER, buffers=[(0, (1, 4096 - 32))]), "a buffer lies outside its segment"),
        (edited(GATHER, buffers=[(0, (1, -2))]), "a buffer lies outside its segment"),
        (edited(GATHER, buffers=[(1, (1, 4))]), "a buffer is not aligned"),
        (edited(GATHER, buffers=[(2, (1, 0))]), "it writes to a segment that is only read"),
        (edited(GATHER, buffers=[(0, (0, 16))]), "what it writes overlaps what it reads"),
        (edited(GATHER, integers=[(0, 1 << 39), (1, 1 << 39)]), "a size is out of range"),
        (edited(GATHER, integers=[(3, -1)]), "integer -1 is out of range"),
        (edited(PRODUCT, integers=[(0, 2)]), "integer 2 is out of range"),
        (edited(PRODUCT, integers=[(12, 1)]), "a linear layer keeps its positions"),
        (edited(PRODUCT, buffers=[(0, (0, 0))]), "what it writes overlaps what it reads"),
        ((*NORM, [0, 1, 16, 0, 8, 3, 0, 1, 1], [1e-5]), "the groups do not divide the channels"),
        ((*NORM, [0, 1, 16, 0, 8, 4, 0, 1, 1], [-1.0]), "eps is negative"),
        ((*NORM, [0, 1, 16, 16, 8, 4, 0, 1, 1], [1e-5]), "skip does not fit its channels"),
        (edited(CALLS[0], integers=[(5, 8)]), "channels are no multiples of 16"),
        (edited(CALLS[0], integers=[(8, 3)]), "there is no such tile"),
        (edited(CALLS[4], reals=[(0, -1.0)]), "clip is not positive"),
        (edited(CALLS[4], integers=[(4, 48)]), "the images do not have equal sizes"),
    ],
)
def test_a_call_that_is_none_is_refused(call, reason):
    native.module.Plan(SEGMENTS, [GATHER])
    with pytest.raises(ValueError, match=f"^call 1, {call[0]}: {reason}"):
        native.module.Plan(SEGMENTS, [GATHER, call])


def test_a_plan_runs_over_the_segments_it_was_made_for():
    plan, memory = native.module.Plan(SEGMENTS, [GATHER]), torch.zeros(1 << 13, dtype=torch.uint8)
    addresses = [memory.data_ptr(), memory.data_ptr() + (1 << 12)]
    plan.run(addresses, 0, 1, 2)
    for wrong, reason in (
        (([addresses[0]], 0, 1, 2), "the plan has 2 segments"),
        ((addresses, 0, 2, 2), "the plan has 1 calls"),
        ((addresses, 1, 0, 2), "the plan has 1 calls"),
        (([addresses[0] + 1, addresses[1]], 0, 1, 2), "a segment is not aligned"),
        ((addresses, 0, 1, 0), "num_threads is 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan.run(*wrong)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_damaged_calls_reach_nothing_outside_their_segments(call):
    """Each is refused, or runs and leaves the bytes around its segments, and what is only read, as they are."""
    numbers, pad, runs = Random(call[0]), 1 << 12, 0
    memory = torch.empty(4 * pad + 2 * (1 << 16), dtype=torch.uint8)
    first, second = pad, 2 * pad + (1 << 16)
    interesting = [-1, 0, 1, 2, 3, 5, 8, 15, 16, 17, 48, 63, 1024, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)]
    for _ in range(1500):
        name, *lists = edited(call)
        for _ in range(numbers.choice([0, 1, 1, 2, 3])):
            values = numbers.choice(lists[:2])
            place = numbers.randrange(len(values))
            if values is lists[0]:
                values[place] = (numbers.choice([-1, 0, 1, 2]), numbers.choice([*interesting, 64, 4096, (1 << 16) - 64]))
            else:
                values[place] = numbers.choice([*interesting, values[place] + 1, 2 * values[place] % (1 << 62)])
        try:
            plan = native.module.Plan(BIG, [(name, *lists)])
        except (ValueError, TypeError):  # a number beyond 64 bits is not one of C++'s
            continue
        memory.zero_()
        memory[:first], memory[first + (1 << 16) : second], memory[second + (1 << 16) :] = 7, 7, 7
        before = memory.clone()
        try:
            plan.run([memory.data_ptr() + first, memory.data_ptr() + second], 0, 1, 2)
        except IndexError:
            continue
        before[first : first + (1 << 16)] = memory[first : first + (1 << 16)]
        assert torch.equal(memory, before), (name, lists)
        runs += 1
    assert runs > 50


def test_norms_take_each_layout():
    weight, bias = random(16, seed=1), random(16, seed=2)
    for layout in (torch.contiguous_format, LAST):
        x, skip = random(2, 8, 5, 7, layout=layout), random(2, 8, 5, 7, layout=layout, seed=3)
        shift = random(2, 40, seed=4)

        def norm(x, skip, shift):
            return group_norm_silu(x, 4, weight, bias, skip=skip, pre_shift=shift[:, 8:24])

        assert torch.equal(captured(norm, x, skip, shift), norm(x, skip, shift))
