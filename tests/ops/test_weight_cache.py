import ctypes
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from ddim_fast.ops.weight_cache import cached, converted, forget


@pytest.fixture(params=["contiguous", "channels_last", "one element"])
def weight(request):
    shape = (1,) if request.param == "one element" else (40, 30, 3, 3)
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    return weight.to(memory_format=torch.channels_last) if request.param == "channels_last" else weight


def counted(weight):
    """A function that says how often something was made of ``weight``."""
    made = []

    def use() -> int:
        assert cached(weight, "sum", lambda: made.append(1) or weight.sum()) == weight.sum()
        return len(made)

    return use


def test_it_is_made_once(weight):
    use = counted(weight)
    assert [use() for _ in range(3)] == [1, 1, 1]


def test_each_key_has_its_own(weight):
    assert cached(weight, 1, lambda: "a") == "a" and cached(weight, 2, lambda: "b") == "b"
    assert cached(weight, 1, lambda: "c") == "a"


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1),
        lambda w: w.copy_(torch.zeros_like(w)),
        lambda w: w.detach().mul_(2),
        lambda w: w.view(-1)[-1:].add_(1) if w.is_contiguous() else w[-1, -1, -1, -1].add_(1),
        lambda w: setattr(w, "data", w.data.clone()),
        lambda w: forget(w),
    ],
    ids=["add_", "copy_", "through a view", "one element", "other memory", "forgotten"],
)
def test_it_is_made_anew_when_the_weight_changes(weight, change):
    use = counted(weight)
    use()
    change(weight)
    assert [use(), use()] == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.ones(4)}),
        lambda m: m.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, assign=True),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.bfloat16).to(torch.float32),
        lambda m: nn.init.ones_(m.weight),
        lambda m: torch.optim.SGD([m.weight], 1.0).step(),
    ],
    ids=["load_state_dict", "assigned", "dtype", "dtype and back", "initialised", "optimiser"],
)
def test_changes_of_a_module(change):
    module = nn.Linear(4, 4)
    module.weight.grad = torch.ones(4, 4)
    cached(module.weight, "copy", module.weight.detach().clone)
    change(module)
    assert torch.equal(cached(module.weight, "copy", module.weight.detach().clone), module.weight)


def test_other_memory_at_the_same_address_is_a_change():
    """As an allocator gives it out: a version counter does not tell the two apart."""
    weight = nn.Parameter(torch.zeros(64), requires_grad=False)
    old, address = weight.data, weight.data_ptr()
    cached(weight, "copy", weight.clone)
    memory = (ctypes.c_float * 64).from_address(address)
    weight.data = torch.frombuffer(memory, dtype=torch.float32)
    assert weight.data_ptr() == address and weight._version == old._version == 0
    weight.data.fill_(1)
    assert torch.equal(cached(weight, "copy", weight.clone), torch.ones(64))


def uncounted(kind):
    """A weight, and a write into it that PyTorch does not count."""
    if kind == "through data":
        weight = nn.Parameter(torch.ones(100))
        return weight, lambda: weight.data.mul_(2)
    with torch.inference_mode():
        weight = torch.ones(100)
    return weight, torch.inference_mode()(lambda: weight.mul_(2))


@pytest.mark.parametrize("kind", ["through data", "of inference mode"])
def test_writes_that_are_not_counted_need_forget(kind):
    weight, write = uncounted(kind)
    first = cached(weight, "copy", weight.detach().clone)
    write()
    assert cached(weight, "copy", weight.detach().clone) is first
    forget(weight)
    assert torch.equal(cached(weight, "copy", weight.detach().clone), weight)


def test_of_weights_that_overlap_themselves():
    weight = torch.ones(1).expand(1000)
    assert counted(weight)() == 1


def test_it_keeps_no_weight_alive():
    weight = nn.Parameter(torch.ones(10))
    gone, value_gone = weakref.ref(weight), weakref.ref(cached(weight, 0, lambda: torch.ones(3)))
    del weight
    gc.collect()
    assert gone() is None and value_gone() is None


def test_converted():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    narrow = converted(weight, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(narrow, weight.bfloat16()) and not narrow.requires_grad
    assert converted(weight, torch.bfloat16) is narrow
    wide = converted(weight, torch.float32)
    assert torch.equal(wide, weight) and wide.data_ptr() != weight.data_ptr()
    assert converted(wide, torch.float32) is wide  # nothing to convert
    matrix = nn.Parameter(torch.randn(4, 4))
    assert converted(matrix, torch.float32) is matrix


@pytest.fixture
def switching_often():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_share_what_one_of_them_makes(switching_often):
    threads, keys, rounds = 4, 6, 60
    barrier = Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            weight = nn.Parameter(torch.randn(64))
            made: list[int] = []

            def use(first: int, weight=weight, made=made) -> list[torch.Tensor]:
                def make(key: int) -> torch.Tensor:
                    made.append(key)
                    return weight.detach() + key

                barrier.wait()
                return [cached(weight, key, lambda key=key: make(key)) for key in (*range(first, keys), *range(first))]

            results = list(pool.map(use, range(threads)))
            assert sorted(made) == list(range(keys))
            for first, values in enumerate(results):
                for key, value in zip((*range(first, keys), *range(first)), values, strict=True):
                    assert torch.equal(value, weight + key)


def test_a_write_by_another_thread_while_it_is_made_is_a_change():
    weight = nn.Parameter(torch.zeros(4), requires_grad=False)

    def make() -> torch.Tensor:
        result = weight.clone()
        weight.add_(1)  # as an optimiser's step in another thread would
        return result

    cached(weight, "copy", make)
    assert torch.equal(cached(weight, "copy", weight.clone), torch.ones(4))
