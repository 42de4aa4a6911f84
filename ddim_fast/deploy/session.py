"""A model in ONNX Runtime: its execution provider, and calls whose tensors stay on the device. No torch."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

try:
    import onnxruntime
except ModuleNotFoundError:
    raise ModuleNotFoundError("this needs onnxruntime: pip install 'ddim_fast[onnx]', or onnxruntime alone") from None

from ..io.files import one_line
from ..io.processes import cpu_threads

__all__ = ["Session", "onnxruntime", "pick_provider"]

# The providers to choose from by default, the fastest first. TensorRT and the like compile for minutes: by name only.
_PREFERRED = ("CUDA", "ROCM", "Dml", "CPU")


# An ONNX model of one Identity; the package that could make it, onnx, is not needed for sampling.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def pick_provider(name: str | None = None) -> str:
    """ONNX Runtime's name of an execution provider.

    Args:
        name: ``cuda``, ``cpu``, ``tensorrt`` ..., or ONNX Runtime's own name; None is the fastest that starts here, with a
            warning if this onnxruntime was built for one that does not.

    Raises:
        ValueError: this onnxruntime lacks it.
    """
    there = {p.removesuffix("ExecutionProvider"): p for p in onnxruntime.get_available_providers()}
    if name is None:
        return next(there[p] for p in _PREFERRED if p in there and (p == "CPU" or _starts(there[p])))
    for short, provider in there.items():
        if name.lower() in (short.lower(), provider.lower()):
            return provider
    raise ValueError(f"provider {name!r} is not there: this onnxruntime has {', '.join(p.lower() for p in there)}")


def _starts(provider: str) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the warning below names it in one line
    try:
        session = onnxruntime.InferenceSession(_IDENTITY, options, providers=[provider], enable_fallback=0)
        started = provider in session.get_providers()
    except Exception:  # onnxruntime's errors have no other base
        started = False
    if not started:
        warnings.warn(
            f"onnxruntime has {provider}, but it does not start here (no such device, or a library of it is missing); another "
            "provider is used. Name a provider, such as cpu, to avoid this warning",
            stacklevel=4,
        )
    return started


class Session:
    """A model that is ready to run. Calls from several threads take turns.

    Args:
        path: the model's file.
        provider: where it runs, as :func:`pick_provider` returned it.
        cuda_graph: on CUDA, capture the model in a CUDA graph for each set of shapes and replay it. The model must have no
            control flow.

    Raises:
        ValueError: the file is no model, its external data are missing or lie elsewhere, or the provider cannot run it.
    """

    def __init__(self, path: Path, provider: str, *, cuda_graph: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        # Errors are raised; a missing GPU feature is only logged.
        options.log_severity_level = 4 if provider == "CPUExecutionProvider" else 3
        options.intra_op_num_threads = cpu_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls its threads do not spin
        self._device = {"CUDAExecutionProvider": "cuda"}.get(provider, "cpu")
        captured = cuda_graph and self._device == "cuda"
        settings = {"enable_cuda_graph": "1"} if captured else {}
        providers = [(provider, settings)]
        if provider != "CPUExecutionProvider" and not captured:
            providers.append(("CPUExecutionProvider", {}))  # for operators that the other one lacks; a CUDA graph cannot use it
        with _translated(path):
            # The fallback is decided above; onnxruntime's own prints to stdout.
            self._session = onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)
        if provider not in self._session.get_providers():
            raise ValueError(
                f"{path.name}: {provider} does not start here (a library of it is missing); use another --provider"
            )
        self._path = path
        self._turn = threading.Lock()  # calls share their tensors
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._graphs = 0

    def __call__(self, inputs: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The output, of ``shape``, float32. Device tensors are reused while the shapes stay the same.

        Raises:
            ValueError: the model refuses the inputs.
            RuntimeError: memory ran out.
        """
        with _translated(self._path), self._turn:
            shapes = (shape, *(array.shape for array in inputs.values()))
            if shapes != self._shapes:
                self._bind(inputs, shape)
                self._shapes = shapes
            else:
                for name, array in inputs.items():
                    self._inputs[name].update_inplace(np.ascontiguousarray(array))
            self._session.run_with_iobinding(self._binding, self._options)
            return np.array(self._output.numpy())

    def _bind(self, inputs: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
        self._shapes = None
        make = onnxruntime.OrtValue
        # Copies: on a CPU the tensor shares the given array, and the next call writes into it.
        self._inputs = {name: make.ortvalue_from_numpy(np.array(a, order="C"), self._device, 0) for name, a in inputs.items()}
        self._output = make.ortvalue_from_shape_and_type(shape, np.float32, self._device, 0)
        self._binding = self._session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(self._session.get_outputs()[0].name, self._output)
        self._options = onnxruntime.RunOptions()
        if self._device == "cuda":
            self._options.add_run_config_entry("gpu_graph_id", str(self._graphs))
            self._graphs += 1


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Inside, ONNX Runtime's errors become one line about a model file. Their classes have no base but Exception."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, (ValueError, RuntimeError)):
            raise
        text = one_line(error).split(" : ", 3)[-1].removeprefix("Error in execution: ")
        if "allocate" in text:
            raise RuntimeError(f"out of memory: {text}") from None
        raise ValueError(f"{path}: {text}") from None
