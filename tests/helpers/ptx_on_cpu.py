"""What Triton compiled, executed without a GPU: PTX, all threads of a block at a time, in numpy.

Triton's own interpreter runs the source and knows nothing of layouts, shuffles and shared memory; here runs what the compiler
made of them. A kernel's host function is called as it is, on CPU tensors, whose addresses its loads and stores go to.

It is enough of PTX for kernels compiled for sm_80, and for sm_90 where they have no matrix products, whose branches all threads
of a block take alike. Approximate functions are computed exactly, so the last digits are not those of a GPU; but a product or a
quotient that is added keeps all its digits, as the assembler may fuse the two. Asynchronous copies are there at once, so a
missing wait is not found.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.helpers.ahead_of_time import instead_of_launching

SHARED = 227 * 1024
WARP = 32

# All of the process's memory, from this address on, as numbers of each size.
_ORIGIN = 4096
_BYTES = (ctypes.c_uint8 * (1 << 47)).from_address(_ORIGIN)
_MEMORY = {size: np.frombuffer(_BYTES, f"u{size}") for size in (1, 2, 4, 8)}

# In numpy's words.
_TYPES = {
    **{f"{kind}{8 * n}": f"{letter}{n}" for kind, letter in (("b", "u"), ("u", "u"), ("s", "i")) for n in (1, 2, 4, 8)},
    **{"f16": "f2", "f32": "f4", "f64": "f8"},
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")


def run_ptx(call: Callable[[], Any], capability: int = 90) -> Any:
    """``call()``, with every kernel that it launches compiled for ``capability`` and executed here."""

    def run(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        passed = _passed(kernel.src.signature.values(), [arguments[name] for name in kernel.src.signature])
        block = Block(kernel.asm["ptx"], WARP * kernel.metadata.num_warps)
        for place in itertools.product(*(range(n) for n in (*grid, 1, 1)[:3])):
            block.run(passed, place)

    with np.errstate(all="ignore"):
        return instead_of_launching(capability, call, run)


def _passed(kinds: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Of a kernel's arguments, those that are not compiled into it; tuples one by one."""
    passed = []
    for kind, value in zip(kinds, values, strict=True):
        if kind != "constexpr":
            passed += _passed(kind, value) if isinstance(kind, (tuple, list)) else [value]
    return passed


class Block:
    """A kernel, to be run block by block.

    Args:
        ptx: its text, with one entry.
        threads: in a block.
    """

    def __init__(self, ptx: str, threads: int) -> None:
        self.threads = threads
        self.lanes = np.arange(threads)
        body = re.sub(r"//.*|^\s*\.loc.*", "", ptx[ptx.index("{", ptx.index(".entry")) :], flags=re.MULTILINE)
        self.kinds = re.findall(r"\.param \.(\w+)", ptx[: ptx.index("{", ptx.index(".entry"))])
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str, str, list[str], list[str]]] = []
        for line in re.split(r"(?<=[;:])\s*\n", body):
            line = " ".join(line.split()).lstrip("{} ")
            if line.endswith(":") and line.startswith("$"):
                self.labels[line[:-1]] = len(self.code)
            elif (match := _LINE.match(line)) and not line.startswith("."):
                negated, predicate, opcode, operands = match.groups()
                parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
                self.code.append((f"{negated or ''}{predicate or ''}", opcode, opcode.split("."), [p.strip() for p in parts]))

    def run(self, arguments: list[Any], place: tuple[int, int, int]) -> None:
        """One block of the grid, at ``place``."""
        self.registers: dict[str, np.ndarray] = {}
        self.unrounded: dict[str, np.ndarray] = {}
        self.shared = np.full(SHARED, 0xFF, np.uint8)  # NaN until it is written
        self.arguments = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments] + [0, 0]
        blocks = {f"%ctaid.{axis}": np.full(self.threads, n) for axis, n in zip("xyz", place, strict=True)}
        self.special = {"%tid.x": self.lanes, **blocks}
        at = 0
        while at < len(self.code):
            guard, opcode, parts, operands = self.code[at]
            at += 1
            active = np.ones(self.threads, bool)
            if guard:
                active = self.registers[guard.lstrip("!")] ^ guard.startswith("!")
            if parts[0] == "ret":
                return
            if parts[0] == "bra":
                assert active.all() or not active.any(), "threads of a block part ways"
                at = self.labels[operands[0]] if active.all() else at
            elif parts[0] not in ("bar", "barrier"):
                self.execute(opcode, parts, operands, active)

    def execute(self, opcode: str, parts: list[str], operands: list[str], active: np.ndarray) -> None:
        name, kind = parts[0], _TYPES.get(parts[-1])
        if name in ("ld", "st"):
            return self.move(parts, operands, active)
        if name in ("ldmatrix", "stmatrix"):
            return self.move_matrices(parts, operands)
        if name == "mma":
            return self.multiply_matrices(parts, operands)
        if opcode.startswith("cp.async"):
            return self.copy(operands, active) if len(operands) > 1 else None
        values = [self.value(o, kind) for o in operands[1:]] if kind and "{" not in "".join(operands) else []
        if name == "mov":
            if operands[0].startswith("{"):
                size = np.dtype(kind).itemsize // 2
                for i, target in enumerate(_names(operands[0])):
                    self.set(target, (self.value(operands[1], kind) >> 8 * size * i).astype(f"u{size}"), active)
                return None
            if operands[1].startswith("{"):
                low, high = (self.value(n, "u2").astype("u4") for n in _names(operands[1]))
                return self.set(operands[0], low | high << 16, active)
            result = self.value(operands[1], "?" if parts[-1] == "pred" else kind)
        elif parts[-1] == "pred":
            a, *b = (self.value(o, "?") for o in operands[1:])
            result = ~a if name == "not" else {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name](a, *b)
        elif name == "setp":
            result = _COMPARE[parts[1]](*values)
        elif name == "selp":
            result = np.where(self.value(operands[3], "?"), *values[:2])
        elif name == "cvt":
            result = self.convert(parts, operands)
        elif name == "shfl":
            first, lane, b = self.lanes // WARP * WARP, self.lanes % WARP, self.value(operands[2], "i4")
            result = values[0][first + {"bfly": lane ^ b, "idx": b % WARP}[parts[2]]]
        elif name in ("mul", "mad") and parts[1] in ("wide", "hi"):
            bits = 8 * np.dtype(kind).itemsize
            double = f"{kind[0]}{bits // 4}" if bits < 64 else None
            result = values[0].astype(double) * values[1].astype(double)
            result = result >> bits if parts[1] == "hi" else result
            if name == "mad":
                result = result + self.value(operands[3], double)
            result = result.astype(kind) if parts[1] == "hi" else result
        else:
            may_fuse = kind == "f4" and "rn" not in parts
            if may_fuse and name in ("mul", "div"):
                product = _ARITHMETIC[name](*(v.astype("f8") for v in values))
                self.set(operands[0], product.astype(kind), active)
                if active.all():
                    self.unrounded[operands[0]] = product
                return None
            if may_fuse and name in ("add", "sub"):
                values = [self.unrounded.get(o, v) for o, v in zip(operands[1:], values, strict=True)]
            result = _ARITHMETIC[name](*values) if name not in ("min", "max") else _ARITHMETIC[name]("NaN" in parts, *values)
            result = result.astype(kind)
        self.set(operands[0], result, active)

    def convert(self, parts: list[str], operands: list[str]) -> np.ndarray:
        to, source = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2"):
            high, low = (_rounded(self.value(o, "f4"), to[:-2]).astype("u4") for o in operands[1:])
            return high << 16 | low
        if source == "bf16":
            return (self.value(operands[1], "u2").astype("u4") << 16).view("f4").astype(_TYPES[to])
        value = self.value(operands[1], _TYPES[source])
        return _rounded(value, to) if to in ("bf16", "f16") else value.astype(_TYPES[to])

    def move(self, parts: list[str], operands: list[str], active: np.ndarray) -> None:
        load, space, size = parts[0] == "ld", parts[1], np.dtype(_TYPES[parts[-1]]).itemsize
        register, address = operands if load else operands[::-1]
        registers = _names(register)
        if space == "param":
            number = int(re.search(r"_param_(\d+)", address)[1])
            value = self.arguments[number]
            value = np.float32(value).view("u4") if self.kinds[number] in ("b32", "f32") and isinstance(value, float) else value
            return self.set(registers[0], np.full(self.threads, int(value) & (1 << 64) - 1, "u8").astype(f"u{size}"), active)
        where = self.address(address)
        for i, name in enumerate(registers):
            place = where[active] + i * size
            assert not np.any(place % size), f"unaligned access of {size} bytes"
            memory, place = (_MEMORY[size], place - _ORIGIN) if space == "global" else (self.shared.view(f"u{size}"), place)
            if load:
                value = np.zeros(self.threads, f"u{size}")
                value[active] = memory[place // size]
                self.set(name, value, active)
            else:
                memory[place // size] = self.value(name, f"u{size}")[active]

    def move_matrices(self, parts: list[str], operands: list[str]) -> None:
        """8 x 8 matrices of 16-bit numbers; lane 8 i + r has the address of row r of matrix i."""
        load = parts[0] == "ldmatrix"
        register, address = operands if load else operands[::-1]
        where = self.address(address)
        memory, lane = self.shared.view("u2"), self.lanes % WARP
        for i, name in enumerate(_names(register)):
            row, column = lane // 4, 2 * (lane % 4)
            halves = []
            for half in (0, 1):
                r, c = (column + half, row) if "trans" in parts else (row, column + half)
                halves.append(where[self.lanes - lane + 8 * i + r] // 2 + c)
            if load:
                low, high = (memory[h].astype("u4") for h in halves)
                self.set(name, low | high << 16, np.ones(self.threads, bool))
            else:
                value = self.value(name, "u4")
                memory[halves[0]], memory[halves[1]] = value & 0xFFFF, value >> 16

    def multiply_matrices(self, parts: list[str], operands: list[str]) -> None:
        """m16n8k16, of 16-bit numbers: each warp's D = A B + C (PTX ISA, "Matrix Fragments for mma.m16n8k16")."""
        assert parts[3] == "m16n8k16"
        group, pair = self.lanes % WARP // 4, self.lanes % 4 * 2
        warp = self.lanes // WARP
        a, b = np.zeros((self.threads // WARP, 16, 16)), np.zeros((self.threads // WARP, 16, 8))
        c = np.zeros((self.threads // WARP, 16, 8))
        for i, name in enumerate(_names(operands[1])):
            for half, values in enumerate(_halves(self.value(name, "u4"), parts[7])):
                a[warp, group + 8 * (i % 2), pair + half + 8 * (i // 2)] = values
        for i, name in enumerate(_names(operands[2])):
            for half, values in enumerate(_halves(self.value(name, "u4"), parts[7])):
                b[warp, pair + half + 8 * i, group] = values
        places = [(warp, group + 8 * (i // 2), pair + i % 2) for i in range(4)]
        for place, name in zip(places, _names(operands[3]), strict=True):
            c[place] = self.value(name, "f4")
        product = (a @ b + c).astype("f4")
        for place, name in zip(places, _names(operands[0]), strict=True):
            self.set(name, product[place], np.ones(self.threads, bool))

    def copy(self, operands: list[str], active: np.ndarray) -> None:
        """From global to shared memory, with zeros after the bytes that are there."""
        target, source = self.address(operands[0])[active], self.address(operands[1])[active] - _ORIGIN
        size, there = int(operands[2], 0), self.value(operands[3], "i4")[active]
        for i in range(size):
            self.shared[target + i] = 0
            inside = there > i
            self.shared[target[inside] + i] = _MEMORY[1][source[inside] + i]

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.value(base.strip(), "u8").astype(np.int64) + int(offset or 0)

    def value(self, operand: str, kind: str) -> np.ndarray:
        if operand in self.special:
            return self.special[operand].astype(kind)
        if operand.startswith("%"):
            raw = self.registers[operand]
            if kind == "?":
                return raw
            size = np.dtype(kind).itemsize
            return raw.view(kind) if raw.dtype.itemsize == size else raw.astype(f"u{size}").view(kind)
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), "u4").view("f4")
        if operand.startswith("0d"):
            return np.full(self.threads, int(operand[2:], 16), "u8").view("f8")
        if operand == "global_smem":
            return np.zeros(self.threads, kind)
        number = int(operand.removesuffix("U"), 0)
        if kind == "?":
            return np.full(self.threads, number != 0)
        return np.full(self.threads, number & (1 << 64) - 1, "u8").astype(kind)

    def set(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if name == "_":
            return
        self.unrounded.pop(name, None)
        raw = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")
        if not active.all():
            raw = np.where(active, raw, self.registers.get(name, np.zeros_like(raw)))
        self.registers[name] = raw


def _names(register: str) -> list[str]:
    return [name.strip() for name in register.strip("{} ").split(",")]


def _halves(value: np.ndarray, kind: str) -> list[np.ndarray]:
    """Two 16-bit numbers."""
    halves = [value & 0xFFFF, value >> 16]
    return [(h << 16).view("f4") if kind == "bf16" else h.astype("u2").view("f2").astype("f4") for h in halves]


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """float32 in 16 bits, to nearest even."""
    if kind == "f16":
        return value.astype("f2").view("u2")
    bits = value.view("u4").astype("u8")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype("u2")


def _extract(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """A bit field; of signed numbers its highest bit is the sign."""
    size = 8 * value.dtype.itemsize
    return (value << (size - start - length).astype(value.dtype)) >> (size - length).astype(value.dtype)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of the eight of b and a, each chosen by four bits."""
    both, result = a.astype("u8") | b.astype("u8") << 32, np.zeros_like(a)
    for i in range(4):
        chosen = selector >> 4 * i & 0xF
        assert not np.any(chosen & 8), "a byte of its sign alone"
        result |= (both >> 8 * chosen.astype("u8") & 0xFF).astype("u4") << 8 * i
    return result


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f" and a.dtype.itemsize == 4:  # one rounding, up to ties of the rounding before
        return a.astype("f8") * b + c
    return a * b + c


def _bound(function: Callable, quiet: Callable) -> Callable:
    return lambda keeps_nan, a, b: (function if keeps_nan or a.dtype.kind != "f" else quiet)(a, b)


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": _fused,
    "fma": _fused,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else np.trunc(a / b),
    "rem": np.fmod,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": lambda a, b: np.where(b < 8 * a.dtype.itemsize, a << b, 0),
    "shr": lambda a, b: a >> b,
    "bfe": _extract,
    "prmt": _permuted,
    "min": _bound(np.minimum, np.fmin),
    "max": _bound(np.maximum, np.fmax),
    "sqrt": lambda a: np.sqrt(a.astype("f8")),
    "rsqrt": lambda a: 1 / np.sqrt(a.astype("f8")),
    "ex2": lambda a: np.exp2(a.astype("f8")),
    "rcp": lambda a: 1 / a.astype("f8"),
    "lg2": lambda a: np.log2(a.astype("f8")),
}
