"""Trainings by several processes, which are forked from one that has loaded everything, so that each takes no time.

The environment has OMP_NUM_THREADS=1: a process that has started other threads must not be forked.
"""

import os
import socket
import subprocess
import sys

_PROGRAM = """
import os, sys
from pathlib import Path
import torch, torch._dynamo  # which optimizers and DistributedDataParallel import at first use
from ddim_fast.data.images import ImageSet
from ddim_fast.io.processes import Processes
from ddim_fast.training.distributed import whole
from tests.training.test_loop import make_data, make_model, make_trainer

folder, *layouts = sys.argv[1:]
run = Path(folder) / "run"
MAKE

def held(trainer):
    # How many numbers this process holds of the weights, the averages, and Adam's state beside its counts.
    adam = [tensor for state in trainer.optimizer.state.values() for tensor in state.values() if tensor.ndim]
    parts = [trainer.model.parameters(), trainer.ema.state_dict().values(), adam]
    return [sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in part) for part in parts]

def train(layout, rank, count, accumulate, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with Processes() as processes:
        trainer = make(processes, accumulate)
        steps = [[float(step.loss), float(step.grad_norm)] for step in trainer.run()]
        state = {"steps": steps, "held": held(trainer)}
        for name in ("model", "ema"):
            state[name] = {n: whole(tensor) for n, tensor in getattr(trainer, name).state_dict().items()}
        if trainer.held_out is not None:
            state["validation"] = trainer.validation_loss()
        torch.save(state, f"{folder}/{layout}-{rank}.pt")
        if trainer.takes_part:
            trainer.save(run)
        processes.wait()

for layout in layouts:
    count, accumulate, port = layout.split("x")
    children = []
    for rank in range(int(count)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(f"{count}x{accumulate}", rank, int(count), int(accumulate), port)
                status = 0
            finally:
                if status:
                    import traceback
                    traceback.print_exc()
                os._exit(status)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def trained(make: str, layouts: list[tuple[int, int]], folder) -> None:
    """Train in each layout; process r of layout (n, k) leaves ``nxk-r.pt`` in ``folder``: steps, model, ema
    and the numbers held; and each layout its checkpoint in ``folder/run``, which the name ``run`` in the code is.

    Args:
        make: the code of a function ``make(processes, accumulate)`` -> a trainer.
        layouts: numbers of processes and of slices in each.
    """
    words = [f"{count}x{accumulate}x{_free_port()}" for count, accumulate in layouts]
    program = _PROGRAM.replace("MAKE", make)
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder), *words]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


def _free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("localhost", 0))
        return any_socket.getsockname()[1]
