import pytest
import torch
import torch.nn.functional as F

from ddim_fast.ops.conv1x1 import conv1x1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("added", [False, True])
def test_is_the_convolution_and_the_sum(layout, added):
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    other = torch.randn(2, 4, 5, 3, dtype=torch.float64).to(memory_format=layout)
    result = conv1x1(x, weight, other if added else None)
    torch.testing.assert_close(result, F.conv2d(x, weight) + (other if added else 0))
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_convolution(layout):
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64).to(memory_format=layout)
    weight, other = torch.randn(4, 6, 1, 1, dtype=torch.float64), torch.randn(2, 4, 5, 3, dtype=torch.float64)
    tensors = [x.requires_grad_(), weight.requires_grad_(), other.to(memory_format=layout).requires_grad_()]
    assert torch.autograd.gradcheck(conv1x1, tensors)


@torch.no_grad()
def test_dtypes_that_autocast_makes_one():
    x = torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last)
    weight, other = torch.randn(4, 6, 1, 1), torch.randn(2, 4, 5, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    kept = other.clone()
    with torch.autocast("cpu", torch.bfloat16):
        result = conv1x1(x, weight, other)
    torch.testing.assert_close(result.float(), F.conv2d(x, weight) + kept.float(), atol=0.05, rtol=0.05)
