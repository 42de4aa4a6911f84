import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddim_fast.ops import attention as module
from ddim_fast.ops.attention import _registered, _registered_backward, attention, attention_reference
from ddim_fast.ops.dispatch import choose

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

triton_only = pytest.mark.parametrize(
    "backend", ["triton-interpreter", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


def heads_last(t):
    """As a linear layer leaves its tokens, or a channels_last image its positions."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(t):
    """As a contiguous image has its positions: the last stride is not 1."""
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def fused(t):
    """As one layer for query, key and value leaves them: a third of its output."""
    return torch.stack([t.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2)


def sliced(t):
    return t.repeat_interleave(2, dim=3)[..., ::2]


def expanded(t):
    return t[:, :, :1, :1].expand(t.shape)


def make_inputs(n=2, heads=2, queries=17, keys=15, dim=8, *, dtype=torch.float32, device="cpu", mean=0.0, std=1.0):
    """query, key, value and a gradient of the result."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(n, heads, t, dim, dtype=torch.float64) for t in (queries, keys, keys, queries))
    return [t.to(device, dtype) for t in (query * std + mean, key * std + mean, value * std + mean, grad)]


def with_gradients(f, query, key, value, grad, **options):
    """The result of f, and the gradients of its inputs."""
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    out = f(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_as_exact_as_pytorch(inputs, **options):
    """Result and gradients with no more than twice the error of PyTorch's operator in the same precision: root mean square,
    and largest, for which the rounding of the largest value is the least that PyTorch is taken to err by."""
    actual = with_gradients(attention, *inputs, **options)
    plain = with_gradients(attention_reference, *inputs, **options)
    exact = with_gradients(attention_reference, *(t.double() for t in inputs), **options)
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert a.dtype == inputs[0].dtype and a.shape == e.shape
        error, plain_error = a.double() - e, p.double() - e
        assert error.square().mean() <= 4 * plain_error.square().mean(), name
        rounding = torch.finfo(a.dtype).eps * e.abs().max()
        assert error.abs().max() <= 2 * max(plain_error.abs().max(), rounding), name
    return actual


@pytest.fixture(params=DTYPES)
def dtype(request, backend):
    if request.param == "bf16" and backend.interpreted:
        pytest.skip("Triton's interpreter has no products of bfloat16")
    return DTYPES[request.param]


@triton_only
@pytest.mark.parametrize(
    "shape",
    [
        {"n": 3, "heads": 5, "queries": 1, "keys": 17, "dim": 8},
        {"queries": 15, "keys": 65, "dim": 40},
        {"queries": 65, "keys": 15, "dim": 32},
        {"n": 1, "queries": 17, "keys": 200, "dim": 64},
        {"n": 1, "heads": 1, "queries": 200, "keys": 65, "dim": 80},
        {"n": 1, "heads": 1, "queries": 33, "keys": 33, "dim": 256},
    ],
    ids=lambda s: "x".join(str(s[name]) for name in ("queries", "keys", "dim")),
)
def test_as_exact_as_pytorch(backend, dtype, shape):
    assert_as_exact_as_pytorch(make_inputs(**shape, dtype=dtype, device=backend.device))


@triton_only
@pytest.mark.parametrize("layout", [heads_last, channels_first, fused, sliced, expanded], ids=lambda f: f.__name__)
def test_any_strides(backend, layout):
    inputs = [layout(t) for t in make_inputs(queries=20, keys=9, dim=16, device=backend.device)]
    assert not any(t.is_contiguous() for t in inputs)
    results = with_gradients(attention, *inputs)
    torch.testing.assert_close(results, with_gradients(attention_reference, *inputs))
    for tensor in results:
        assert tensor.transpose(1, 2).is_contiguous()


@triton_only
@pytest.mark.parametrize("mean,std", [(-2.3, 0.5), (100.0, 1e-3)])
def test_large_means(backend, mean, std):
    assert_as_exact_as_pytorch(make_inputs(queries=33, keys=40, dim=32, mean=mean, std=std, device=backend.device))


@triton_only
@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 1])
def test_scale(backend, scale):
    inputs = make_inputs(dim=16, device=backend.device)
    expected = with_gradients(attention_reference, *inputs, scale=scale)
    torch.testing.assert_close(with_gradients(attention, *inputs, scale=scale), expected)


@pytest.mark.slow
@triton_only
def test_large_logits_do_not_overflow(backend, dtype):
    """Softmax is ill-conditioned where two large logits nearly tie: with fewer rows than this, one such row decides the largest
    error, and how it rounds on a processor decides the comparison."""
    query, *others = make_inputs(n=4, heads=4, queries=80, keys=70, dim=64, dtype=dtype, device=backend.device)
    for tensor in assert_as_exact_as_pytorch([query * 30, *others]):
        assert tensor.isfinite().all()


@triton_only
def test_one_key_is_taken_whole(backend):
    query, key, value, grad = make_inputs(queries=5, keys=1, device=backend.device)
    out, dq, dk, dv = with_gradients(attention, query, key, value, grad)
    assert torch.equal(out, value.expand_as(out))
    torch.testing.assert_close(dv, grad.sum(2, keepdim=True))
    for gradient in (dq, dk):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@triton_only
@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, in the interpreter
@pytest.mark.parametrize("shape", [{"n": 0}, {"heads": 0}, {"queries": 0}, {"keys": 0}], ids=str)
def test_empty(backend, shape):
    inputs = make_inputs(**shape, device=backend.device)
    actual = with_gradients(attention, *inputs)
    for tensor, like in zip(actual, (inputs[0], *inputs[:3]), strict=True):
        assert torch.equal(tensor, torch.zeros_like(like))


@triton_only
@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, in the interpreter
def test_nan_stays_with_its_query_and_its_key(backend):
    query, key, value, _ = make_inputs(queries=20, keys=20, device=backend.device)
    expected = attention(query, key, value)
    query[0, 1, 3, 2] = float("nan")
    out = attention(query, key, value)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = expected[0, 1, 3]
    assert torch.equal(out, expected)
    key[1, 0, 7, 2] = float("nan")
    assert attention(query, key, value)[1, 0].isnan().all()


@triton_only
def test_an_image_has_the_same_bits_in_every_run_and_every_batch(backend):
    inputs = make_inputs(heads=1, queries=40, keys=33, dim=16, device=backend.device)
    whole = with_gradients(attention, *inputs)
    again = with_gradients(attention, *inputs)
    alone = [with_gradients(attention, *(t[i : i + 1] for t in inputs)) for i in range(2)]
    for first, second, *images in zip(whole, again, *alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first, torch.cat(images))


@triton_only
def test_gradients_in_float64(backend):
    inputs = make_inputs(n=1, queries=3, keys=2, dim=2, dtype=torch.float64, device=backend.device)[:3]
    assert torch.autograd.gradcheck(lambda *tensors: _registered(*tensors, 0.7)[0], [t.requires_grad_() for t in inputs])


@triton_only
def test_the_registered_operators_pass_opcheck(backend):
    query, key, value, grad = make_inputs(queries=5, keys=7, device=backend.device)
    out, lse = _registered(query, key, value, 0.3)
    torch.library.opcheck(_registered_backward, (grad, query, key, value, out, lse, 0.3))
    torch.library.opcheck(_registered, (query.requires_grad_(), key, value.requires_grad_(), 0.3))


@triton_only
def test_floating_point_operations_are_counted(backend):
    query, key, value, grad = make_inputs(n=2, heads=3, queries=5, keys=7, dim=8, device=backend.device)
    query.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attention(query, key, value)
    products = 2 * 3 * 5 * 7 * 8
    assert counter.get_total_flops() == 2 * 2 * products
    with FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 5 * 2 * products


@pytest.mark.parametrize(
    "backend", ["native", "triton-interpreter", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
def test_compiles_without_a_graph_break(backend):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    query, key, value, grad = make_inputs(queries=5, keys=7, device=backend.device)
    compiled = torch.compile(lambda *tensors: attention(*tensors) + 1, fullgraph=True, backend=keep)
    with torch.no_grad():
        torch.testing.assert_close(compiled(query, key, value), attention_reference(query, key, value) + 1)
    called = "ddim_fast.attention" if backend.name == "triton" else "scaled_dot_product_attention"
    assert any(called in str(node.target) for node in graphs[0].graph.nodes)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, query, key, value, grad)
    torch.testing.assert_close(actual, with_gradients(attention_reference, query, key, value, grad))


@triton_only
def test_an_export_holds_pytorchs_own_operators_only(backend):
    model = torch.nn.Module()
    model.forward = lambda *tensors: attention(*tensors)
    graph = torch.export.export(model, tuple(make_inputs(device=backend.device)[:3])).graph
    targets = [str(node.target) for node in graph.nodes]
    assert any("scaled_dot_product_attention" in target for target in targets)
    assert not any("ddim_fast" in target for target in targets)


def test_the_reference_is_the_formula():
    query, key, value, _ = make_inputs(dtype=torch.float64)
    expected = torch.softmax(0.3 * query @ key.transpose(2, 3), dim=-1) @ value
    torch.testing.assert_close(attention(query, key, value, scale=0.3), expected)
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("forced", ["native", "reference"])
def test_pytorch_serves_on_the_cpu_under_every_other_name(forced, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    query, key, value, _ = make_inputs()
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(
    "forced,change,reason",
    [
        ("cuda", {}, "it takes tensors on cuda, not cpu"),
        ("triton", {"dtype": torch.float64}, "not torch.float64"),
        ("triton", {"dim": 257}, "head dimensions up to 256, not 257"),
    ],
)
def test_a_forced_implementation_that_cannot_serve_says_why(forced, change, reason, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    with pytest.raises(ValueError, match=f"DDIM_FAST_BACKEND={forced} cannot serve attention: .*{reason}"):
        attention(*make_inputs(**change)[:3])


@triton_only
def test_the_kernel_serves_where_it_was_measured_to_pay(backend, monkeypatch):
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    monkeypatch.setattr(module, "FASTER_IN_TRITON", ((torch.float32, 16, 8, 4),))

    def chosen(*inputs):
        return choose("attention", module.IMPLEMENTATIONS, module._Call(*inputs, None)).backend

    query, key, value, _ = make_inputs(queries=16, keys=16, device=backend.device)
    # It was measured on a GPU; the interpreter, which is slow, serves only where it is asked for.
    assert chosen(query, key, value) == ("native" if backend.interpreted else "triton")
    assert chosen(query[:1], key[:1], value[:1]) != "triton"
    assert chosen(query, key[:, :, :15], value[:, :, :15]) != "triton"
    assert chosen(query.requires_grad_(), key, value) != "triton"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"query": torch.zeros(2, 17, 8)}, r"query must be .* of shape \(N, heads, queries, dim\); got torch.float32"),
        ({"query": torch.zeros(2, 2, 17, 8, dtype=torch.int64)}, "int64"),
        ({"query": torch.zeros(2, 2, 17, 0)}, "query must be"),
        ({"key": torch.zeros(2, 2, 15, 9)}, r"key must have shape \(2, 2, keys, 8\) to fit query; got \(2, 2, 15, 9\)"),
        ({"key": torch.zeros(2, 1, 15, 8)}, "key must have shape"),
        ({"key": torch.zeros(15, 8)}, "key must have shape"),
        ({"value": torch.zeros(2, 2, 14, 8)}, r"value must have the shape of key, \(2, 2, 15, 8\); got \(2, 2, 14, 8\)"),
        ({"value": torch.zeros(2, 2, 15, 4)}, "value must have the shape of key"),
        ({"key": torch.zeros(2, 2, 15, 8).half()}, "key is torch.float16, but query is torch.float32"),
        ({"value": torch.zeros(2, 2, 15, 8, device="meta")}, "value is on meta, but query is on cpu"),
        ({"scale": float("nan")}, "scale must be a finite number; got nan"),
    ],
)
def test_bad_inputs_are_named(change, message):
    query, key, value, _ = make_inputs()
    with pytest.raises(ValueError, match=message):
        attention(**{"query": query, "key": key, "value": value} | change)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_captured_graph_replays_with_new_inputs(backend):
    inputs = make_inputs(queries=100, keys=77, dim=64, dtype=torch.float16, device=backend.device)
    with_gradients(attention, *inputs)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(attention, *inputs)
    for tensor in inputs:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for tensor, expected in zip(captured, with_gradients(attention, *inputs), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_offsets_beyond_32_bits(backend):
    inputs = make_inputs(queries=70, keys=70, dim=64, dtype=torch.float16, device=backend.device)
    expected = with_gradients(attention, *inputs)
    far = torch.zeros(2**31 + inputs[0].numel(), dtype=torch.float16, device=backend.device)
    for i in range(len(inputs)):
        strides = (2**31, *inputs[i].stride()[1:])
        moved = far.as_strided(inputs[i].shape, strides).copy_(inputs[i])
        actual = with_gradients(attention, *inputs[:i], moved, *inputs[i + 1 :])
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
