"""Keep a stage of a run in small files: ``python examples/faces/stage.py RUN STAGE``.

STAGE/averaged is the checkpoint that is sampled; STAGE/raw has the weights that training goes on with, its optimiser
starting anew (``ddim_fast.train --init STAGE/raw``). Both are bfloat16, in files of at most 16 MB. STAGE/stage.json
says how far the run was.
"""

import sys
from pathlib import Path

import torch

from ddim_fast.io.files import atomic_folder, write_json
from ddim_fast.models.checkpoint import load_config, save_checkpoint
from ddim_fast.models.weights import read_pickle


def main(run: str, stage: str) -> None:
    config, state = load_config(Path(run)), read_pickle(Path(run) / "training_state.pt")
    with atomic_folder(Path(stage)) as new:
        for name, weights in (("raw", state["model"]), ("averaged", state["ema"])):
            stored = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
            save_checkpoint(new / name, config, stored, max_shard_size="16MB")
        images = state["step"] * state["options"]["batch_size"]
        write_json(new / "stage.json", {"step": state["step"], "images": images, "options": state["options"]})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
