"""Calls with a mistake in them: each is one line that says what is wrong and what to do, and touches nothing.

Below every command stands the exit code that it has to end with, 2 where an option or argument is at fault and 1 where it is
something else, and what its line has to say: all of it in this order, with anything in the place of "...".
"""

import dataclasses
import errno
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import UNet, UNetConfig
from ddim_fast import __main__ as all_commands
from ddim_fast.cli.parser import run_command
from ddim_fast.models.autoencoder import Autoencoder
from ddim_fast.models.config import AutoencoderConfig
from tests.helpers.tones import MEL, RATE, tone

CALLS = """

# ddim_fast

ddim_fast smaple
    2 there is no command 'smaple'; did you mean sample?
ddim_fast --verison
    2 there is no command '--verison'; did you mean --version?
ddim_fast train.py
    2 there is no command 'train.py'; did you mean train?
ddim_fast --model small sample
    2 there is no command '--model'; ddim_fast --help lists them, and options come after one
ddim_fast restyle_sounds
    2 there is no command 'restyle_sounds'; did you mean restore_sounds?
ddim_fast --hlep
    2 there is no command '--hlep'; did you mean --help?

# doctor

doctor now
    2 unrecognized arguments: now
doctor --fix
    2 unrecognized arguments: --fix

# models

models cifar10-64
    2 unrecognized arguments: cifar10-64
models --long
    2 unrecognized arguments: --long

# demo

demo --port 70000
    2 --port must be in 0..65535; got 70000
demo --port http
    2 argument --port: 'http' is not a whole number
demo --prot 7860
    2 unrecognized arguments: --prot 7860; did you mean --port?
demo --model nobody --port 0
    2 unknown model 'nobody': neither a folder or file nor a packaged model (cifar10-64, ...)
demo --model voices --port 0
    2 --model voices is a model of sounds, not of pictures: the page shows images
demo --device gpu --port 0
    2 unknown device 'gpu'; choose auto, cpu or cuda
demo --model truncated --port 0
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
without=gradio demo --port 0
    1 the page needs gradio: pip install 'ddim_fast[demo]'
demo --modle small
    2 unrecognized arguments: --modle small; did you mean --model?

# sample

sample --model small --stpes 20
    2 unrecognized arguments: --stpes 20; did you mean --steps?
sample --model small --step 20
    2 unrecognized arguments: --step 20; did you mean --steps?
sample --model small --steps 0
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got 0
sample --model small --steps many
    2 argument --steps: 'many' is not a whole number
sample --model small --steps
    2 argument --steps: expected one argument
sample --model small --eta -0.1
    2 --eta must lie in [0, 1] or be 'sigma-hat'; got -0.1
sample --model small --eta sigmahat
    2 argument --eta: 'sigmahat' is neither a number in [0, 1] nor 'sigma-hat'
sample --model small --solver ddmi
    2 argument --solver: invalid choice: 'ddmi'; did you mean 'ddpm'? There are ddim, ddpm, dpm-solver++, ... heun
sample --model small --solver euler
    2 argument --solver: invalid choice: 'euler'; there are ddim, ddpm, dpm-solver++, ... heun
sample --model small --solver unipc --eta 1
    2 --eta is an option of the ddim solver; unipc takes eta = 0 only (got 1.0)
sample --model small --spacing quadratik
    2 unknown spacing 'quadratik'; there are linear, quadratic, ...
sample --model small --spacing 900,1000
    2 timesteps must lie in 0..999; got 900..1000
sample --model small --spacing 900,900,0
    2 timesteps must be distinct; 900 is listed 2 times
sample --model small --spacing -1,5
    2 argument --spacing: expected one argument
sample --model small --spacing 900,400,0 --steps 4
    2 --steps 4 does not match the 3 timesteps of --spacing; leave it out
sample --model small --solver consistency --spacing adaptive --steps 2
    2 --spacing adaptive: solver consistency takes the timesteps that a model was trained for by python -m
      ddim_fast.train --consistency 999,400 --init MODEL; this model was not
sample --model small --spacing adaptive
    2 --spacing adaptive: no timesteps have been fitted to this model and ddim; fit them once by python -m
      ddim_fast.evaluate --fit-timesteps --model MODEL
sample --model small --seeds 5-1
    2 argument --seeds: the range '5-1' runs backwards
sample --model small --seeds x
    2 argument --seeds: 'x' is not a list of whole numbers and ranges such as 0-63 or 1,5,7-9
sample --model small --seeds 99999999999999999999
    2 a seed is a whole number from 0 to 2^63 - 1; got 99999999999999999999
sample --model small --seeds 3,4,3
    2 --seeds names 3 more than once: a folder holds one image per seed; name a .npz file, which holds them all
sample --model small --seeds 0-99999999999
    2 argument --seeds: up to '0-99999999999' there are more than 10,000,000 numbers; name fewer
sample --model small --seeds 0-5999999,0-5999999
    2 argument --seeds: up to '0-5999999' there are more than 10,000,000 numbers; name fewer
sample --model small --num-images 0
    2 argument --num-images: '0' is not a positive whole number
sample --model small --num-images 3 --seeds 0-2
    2 argument --seeds: not allowed with argument --num-images
sample --model small --class hrse
    2 --class: no class is called 'hrse'; did you mean 'horse'? There are airplane, ...
sample --model small --class boot
    2 --class: no class is called 'boot'; there are airplane, ...
sample --model small --class 10
    2 --class: class 10 is out of range: the network has classes 0..9
sample --model small --class 5-3
    2 --class: the range '5-3' runs backwards
sample --model small --class none --guidance 2
    2 --guidance 2.0 needs class labels to guide towards
sample --model plain --class cat
    2 --class: the network is unconditional: it has no classes
sample --model small --guidance nan
    2 --guidance must be a finite number, or one for each step; got nan
sample --model small --guidance inf
    2 --guidance must be a finite number, or one for each step; got inf
sample --model small --guidance strong
    2 argument --guidance: 'strong' is not a number
sample --model small --guidance 2,3 --steps 3
    2 --guidance has 2 scales; give one, or one for each of the 3 steps
sample --model small --guidance 2,,3
    2 argument --guidance: '' is not a number
sample --model small --guidance 1,2 --steps 2 --guidance-interval 300 600
    2 --guidance-interval limits a single scale; in a list of scales, 1 leaves a step out
sample --model small --guidance 2 --guidance-interval 600 300
    2 --guidance-interval must be two timesteps, the lower one first, from 0 to 999; got [600, 300]
sample --model small --guidance 2 --guidance-interval 300
    2 argument --guidance-interval: expected 2 arguments
sample --model small --guidance 2 --guidance-interval 300 310 --steps 2
    2 --guidance-interval 300 310 holds no step, so nothing would be guided; the steps are at 999, 0
sample --model small --guidance-interval 300 600
    2 --guidance-interval limits --guidance; give its scale, such as --guidance 2, as well
sample --model small --guide small
    2 --guide is what --guidance leads away from; give its scale, such as --guidance 2, as well
sample --model small --guide nobody --guidance 2
    2 unknown model 'nobody': neither a folder or file nor a packaged model (cifar10-64, ...)
sample --model small --guide latent --guidance 2
    2 the guide must be of the same kind as the network: its image_shape is (2, 8, 8), not (3, 16, 16)
sample --model small --guide truncated --guidance 2
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
sample --model small --tolerance 0
    2 --tolerance must be a positive number; got 0.0
sample --model small --tolerance small
    2 argument --tolerance: 'small' is not a number
sample --model small --tolerance 0.1 --steps 4
    2 --tolerance takes the place of --steps and --spacing; give one or the other
sample --model small --tolerance 0.1 --eta 1
    2 a tolerance has a deterministic solver of its own: eta must be 0 and solver ddim; got 1.0, ddim
sample --model small --tolerance 0.1 --solver unipc
    2 a tolerance has a deterministic solver of its own: eta must be 0 and solver ddim; got 0.0, unipc
sample --model small --tolerance 0.1 --reuse 2
    2 reuse=2 needs fixed steps, but with a tolerance each image takes steps of its own
sample --model small --tolerance 0.1 --trajectory new.gif
    2 --trajectory films steps that all images share, but with --tolerance each image takes its own; leave out one of them
sample --model small --tolerance 0.1 --engine captured
    2 the captured engine needs fixed steps, but with a tolerance each image takes steps of its own; use engine eager,
      or fixed steps
sample --model small --clip 0
    2 --clip must be a positive number; got 0.0
sample --model small --reuse 0
    2 argument --reuse: '0' is not a positive whole number
sample --model small --batch-size 0
    2 argument --batch-size: '0' is not a positive whole number
sample --model small --device abacus
    2 unknown device 'abacus'; choose auto, cpu or cuda
sample --model small --device cuda
    2 --device 'cuda' is not available: torch sees no CUDA device; choose auto or cpu
sample --model small --dtype float61
    2 argument --dtype: invalid choice: 'float61'; did you mean 'float16'? There are auto, float32, bfloat16, float16,
      int8
sample --model small --dtype int8 --device cpu --steps 1 --seeds 0
    2 conv3x3 has no 8-bit products here: it ...
sample --model small --engine warp
    2 argument --engine: invalid choice: 'warp'; there are auto, eager, compiled, captured, onnx
sample --model small --provider cpu
    2 --provider needs --engine onnx
sample --model small --engine onnx --compile
    2 --compile is not an option of --engine onnx
sample --model small --engine onnx --dtype float32
    2 --dtype is not an option of --engine onnx (see export --dtype)
sample --model small --engine onnx --provider tpu
    2 --provider 'tpu' is not there: this onnxruntime has ...
sample --model small --engine onnx --tolerance 1
    2 --tolerance is not an option of --engine onnx
sample --model small --profile --grid new.png
    2 --profile needs fixed steps in torch in one process and writes no images; leave out --grid
sample --model small --profile --trajectory new.gif
    2 --profile needs fixed steps in torch in one process and writes no images; leave out --trajectory
sample --model small --profile --tolerance 0.1
    2 --profile needs fixed steps in torch in one process and writes no images; leave out --tolerance
sample --model small photos
    2 unrecognized arguments: photos
sample --model small --steps 1 --seeds 0 --out notes
    2 --out notes is a file; name a folder that is new or empty
sample --model small --steps 1 --seeds 0 --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
sample --model small --steps 1 --seeds 0 --out restored
    2 --out restored holds the output of restore, not of sample; name another --out
sample --model small --steps 1 --seeds 0 --out run
    2 --out run is not empty (config.json and 6 more); name a folder that is new or empty
sample --model small --steps 1 --seeds 0 --out small
    2 --out small is not empty (README.md and 2 more); name a folder that is new or empty
sample --model small --steps 1 --seeds 0 --out samples
    2 --out samples was begun with --seeds 0-1, not 0; give the same settings to continue it, or name another --out
sample --model small --steps 2 --seeds 0-2 --out samples
    2 --out samples was begun with --seeds 0-1, not 0-2; give the same settings to continue it, or name another --out
sample --model small --steps 2 --seeds 0-1 --class horse --out samples
    2 --out samples was begun with --class all, not 7; give the same settings to continue it, or name another --out
sample --model small --steps 3 --seeds 0-1 --out samples.npz
    2 --out samples.npz was begun with --steps 2, not 3; give the same settings to continue it, or name another --out
sample --model plain --steps 2 --seeds 0-1 --out samples
    2 --out samples was begun with --model sha256:..., not sha256:...; give the same settings to continue it, or name
      another --out
sample --model small --steps 2 --seeds 0-1 --out samples.npz --grid new.png
    2 samples.npz is finished, and --grid and --trajectory are made while sampling; name another --out
sample --model small --steps 1 --seeds 0 --out images.zip
    2 --out images.zip would be a folder of that name; name one without .zip
sample --model small --steps 1 --seeds 0 --out images.png
    2 --out images.png would be a folder of that name; name one without .png
sample --model small --steps 1 --seeds 0 --out images.webp
    2 --out images.webp would be a folder of that name; name one without .webp
sample --model small --steps 1 --seeds 0 --out new.gif
    2 --out new.gif would be a folder of that name; name one without .gif
sample --model small --steps 1 --seeds 0 --out notes/new
    2 --out notes/new: notes is a file, not a folder; name another place
sample --model small --steps 1 --seeds 0 --out notes/new.npz
    2 --out notes/new.npz.partial: notes is a file, not a folder; name another place
sample --model small --steps 1 --seeds 0 --out text.npz
    2 --out text.npz exists and has no record.json of its settings; name another file
sample --model small --steps 1 --seeds 0 --out whole.npz
    2 --out whole.npz exists and has no record.json of its settings; name another file
sample --model small --steps 1 --seeds 0 --out bad-record
    2 bad-record/record.json: not whole JSON (...); name another --out
sample --model small --steps 1 --seeds 0 --out ''
    2 --out . is not empty (album and ... more); name a folder that is new or empty
sample --model small --steps 1 --seeds 0 --out
    2 argument --out: expected one argument
sample --model small --steps 1 --seeds 0 --grid grid.png
    2 --grid grid.png exists; name another file
sample --model small --steps 1 --seeds 0 --grid new.psd
    2 new.psd: unknown image format; name a .png file
sample --model small --steps 1 --seeds 0 --grid new
    2 new: unknown image format; name a .png file
sample --model small --steps 1 --seeds 0 --grid notes/new.png
    2 --grid notes/new.png: notes is a file, not a folder; name another place
sample --model small --steps 1 --seeds 0 --grid album
    2 album: unknown image format; name a .png file
sample --model small --steps 1 --seeds 0 --grid folder.png
    2 --grid folder.png exists; name another file
sample --model small --steps 1 --seeds 0 --trajectory film.gif
    2 --trajectory film.gif exists; name another file
sample --model small --steps 1 --seeds 0 --trajectory new.mp4
    2 --trajectory writes a GIF; got 'new.mp4'
sample --model small --steps 1 --seeds 0 --trajectory notes/new.gif
    2 --trajectory notes/new.gif: notes is a file, not a folder; name another place
sample --model small --steps 1 --seeds 0 --grid new.gif --trajectory new.gif
    2 --grid and --trajectory are both new.gif; name two files
sample --model cifar10-46
    2 unknown model 'cifar10-46': neither a folder or file nor a packaged model (cifar10-64, ...); did you mean
      'cifar10-64'?
sample --model empty
    1 empty is not a checkpoint: it has no config.json
sample --model photos
    1 photos is not a checkpoint: it has no config.json
sample --model notes
    1 notes: not a whole file of tensors; copy or download it again
sample --model text.ckpt
    1 text.ckpt: not a whole file of tensors; copy or download it again
sample --model text.safetensors
    1 text.safetensors: not a whole safetensors file (... header too large); copy or download it again
sample --model text.png
    1 text.png: not a whole file of tensors; copy or download it again
sample --model run/train.json
    1 run/train.json: not a whole file of tensors; copy or download it again
sample --model run/training_state.pt
    1 run/training_state.pt: neither a network's tensors by name nor a list that begins with them
sample --model zeros
    1 zeros/model.safetensors: not a whole safetensors file (... invalid JSON in header: EOF while parsing a value at line
      1 column 0); copy or download it again
sample --model no-json
    1 no-json/config.json: not whole JSON (Expecting property name enclosed in double quotes: line 39 column 2 (char 690))
sample --model list-json
    1 list-json/config.json: not a JSON object
sample --model unknown-key
    1 unknown-key/config.json: unknown configuration key 'dropuot'; did you mean 'dropout'?
sample --model wrong-type
    1 wrong-type/config.json: base_channels must be an integer; got '8'
sample --model wider
    1 wider/model.safetensors: tensor 'conv_in.weight' has shape (8, 3, 3, 3), the network needs (16, 3, 3, 3)
sample --model deeper
    1 deeper/model.safetensors: missing tensor 'down_blocks.0.resnets.1.conv1.bias'
sample --model no-weights
    1 no-weights is not a checkpoint: it has no model.safetensors
sample --model no-config
    1 no-config is not a checkpoint: it has no config.json
sample --model latent/autoencoder
    1 latent/autoencoder/config.json: this describes an autoencoder, not a diffusion model; name the folder of a model of
      its latents
sample --engine onnx --model voices
    2 --model voices is a model of sounds, which needs torch: leave out --engine onnx
sample --engine onnx --model latent
    2 --model latent is a model of an autoencoder's latents, which needs torch: leave out --engine onnx
sample --model voices --seeds 0 --steps 1 --out new.npz
    2 --out new.npz: a .npz file holds images; name a folder for the model's sounds
sample --model voices --class an
    2 --class: no class is called 'an'; did you mean 'ann'? There are 0/ann, 0/bob
without=torch sample --model small
    1 torch is not installed; --engine onnx and --engine plan sample without it
DDIM_FAST_BACKEND=warp sample --model small --steps 1 --seeds 0
    2 DDIM_FAST_BACKEND='warp' is unknown; choose reference, native, triton, cuda
DDIM_FAST_BACKEND=cuda sample --model small --steps 1 --seeds 0 --device cpu
    2 DDIM_FAST_BACKEND=cuda cannot serve group_norm_silu: it takes float32, bfloat16 and float16 on a GPU, not
      torch.float32 on cpu
sample --model small --num-images 99999999999
    2 argument --num-images: 99999999999 is more than 100,000,000
sample --model small --num-images 3 --out a.png
    2 --out a.png would be a folder of that name; name one without .png
sample --model small --steps 1 --seeds 0 --out notes/a/b/c
    2 --out notes/a/b/c: notes is a file, not a folder; name another place
sample --model exported
    2 exported is an export to ONNX; sample it with python -m ddim_fast.sample --engine onnx
sample --engine onnx --model exported
    1 exported is not an export: it has no SHA256SUMS
sample --model small --nonsense
    2 unrecognized arguments: --nonsense
sample --model small --steps 1001
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got 1001
sample --model small --steps -5
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got -5
sample --model small --steps 1e3
    2 argument --steps: '1e3' is not a whole number
sample --model small --eta 1.5
    2 --eta must lie in [0, 1] or be 'sigma-hat'; got 1.5
sample --model small --eta nan
    2 --eta must lie in [0, 1] or be 'sigma-hat'; got nan
sample --model small --eta 1e400
    2 --eta must lie in [0, 1] or be 'sigma-hat'; got inf
sample --model small --clip nan
    2 --clip must be a positive number; got nan
sample --model small --tolerance inf
    2 --tolerance must be a positive number; got inf
sample --model small --spacing ''
    2 unknown spacing ''; there are linear, quadratic, ...
sample --model small --seeds ''
    2 argument --seeds: '' is not a list of whole numbers and ranges such as 0-63 or 1,5,7-9
sample --model small --class 3-12
    2 --class: class 10 is out of range: the network has classes 0..9
sample --model small --class horse,,cat
    2 --class: no class is called ''; there are airplane, ...
sample --model small --device cpu:3
    2 unknown device 'cpu:3'; choose auto, cpu or cuda
sample --model small --device mps
    2 unknown device 'mps'; choose auto, cpu or cuda
sample --model small --device cuda:77
    2 --device 'cuda:77' is not available: torch sees no CUDA device; choose auto or cpu
sample --model no-classes
    1 no-classes/model.safetensors: unexpected tensor 'class_embedding.weight'

# reconstruct

reconstruct
    2 the following arguments are required: IMAGES
reconstruct nowhere --model small
    2 no images at 'nowhere': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
reconstruct empty --model small
    2 no images in 'empty': files such as .png or .jpg are needed
reconstruct notes --model small
    2 notes: unknown kind of file; give a folder, an image file ...
reconstruct text.png --model small
    2 text.png: not a readable image (of no format that Pillow decodes)
reconstruct cut.png --model small
    2 cut.png: not a readable image (image file is truncated)
reconstruct zero.png --model small
    2 zero.png: not a readable image (of no format that Pillow decodes)
reconstruct tone.wav --model small
    2 tone.wav: unknown kind of file; give a folder, an image file ...
reconstruct text.npz --model small
    2 text.npz: unknown kind of file; give a folder, an image file ...
reconstruct text.parquet --model small
    2 text.parquet: not a whole Parquet file ...
reconstruct text-idx3-ubyte --model small
    2 text-idx3-ubyte: not a whole IDX file ...
reconstruct whole.npz --model small
    2 whole.npz: unknown kind of file; give a folder, an image file ...
reconstruct photos --model voices
    2 --model voices is a model of sounds, not of pictures: see python -m ddim_fast.restyle
reconstruct photos --model small --class hrse
    2 --class: no class is called 'hrse'; did you mean 'horse'? There are airplane, ...
reconstruct photos --model small --class 10
    2 --class: class 10 is out of range: the network has classes 0..9
reconstruct photos --model plain --class 3
    2 --class: the network is unconditional: it has no classes
reconstruct animals --model small --class none --guidance 2
    2 --guidance 2.0 needs class labels to guide towards
reconstruct photos --model small --steps 0
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got 0
reconstruct photos --model small --eta 1
    2 unrecognized arguments: --eta 1
reconstruct photos --model small --seeds 3
    2 unrecognized arguments: --seeds 3
reconstruct photos --model small --exakt
    2 unrecognized arguments: --exakt; did you mean --exact?
reconstruct photos --model small --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
reconstruct photos --model small --out photos
    2 --out photos is not empty (a.png and 1 more); name a folder that is new or empty
reconstruct photos --model small --out notes
    2 --out notes is a file; name a folder that is new or empty
reconstruct photos --model small --out new.npz --steps 1
    2 --out new.npz would be a folder of that name; name one without .npz
reconstruct photos --model small --out notes/new --steps 1
    2 --out notes/new: notes is a file, not a folder; name another place
reconstruct photos photos --model small --spacing adaptive
    2 --spacing adaptive: no timesteps have been fitted to this model and ddim; fit them once by python -m
      ddim_fast.evaluate --fit-timesteps --model MODEL
reconstruct mixed --model small --steps 1 --engine onnx
    2 argument --engine: invalid choice: 'onnx'; there are auto, eager, compiled, captured
reconstruct photos --model truncated
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
without=torch reconstruct photos --model small
    1 this needs torch, which is not installed: pip install torch
without=pyarrow reconstruct text.parquet --model small
    1 reading Parquet needs pyarrow: pip install 'ddim_fast[train]'
reconstruct photos --model exported
    2 exported is an export to ONNX; sample it with python -m ddim_fast.sample --engine onnx

# edit

edit photos --model small
    2 say how to edit: --strength for SDEdit, --to for another class, or --direction for an attribute
edit photos --model small --strength 1.5
    2 --strength must lie in [0, 1]; got 1.5
edit photos --model small --strength half
    2 argument --strength: 'half' is not a number
edit photos --model small --strength 0.1 --spacing 900,500
    2 no listed timestep lies in 0..99, where the run starts; got 500..900
edit photos --model small --strength 0.5 --seed -3
    2 a seed is a whole number from 0 to 2^63 - 1; got -3
edit photos --model small --strength 0.5 --seed 1.5
    2 argument --seed: '1.5' is not a whole number
edit photos --model small --strength 0.5 --exact
    2 --exact belongs to --to and --direction, which encode the images
edit photos --model small --strength 0.5 --amount 2
    2 --amount belongs to --direction
edit photos --model small --to cat --from dog --seed 1
    2 --seed belongs to SDEdit, without --to and --direction
edit photos --model small --to cat
    2 --to needs the images' own class: give it by --from, or say --from none
edit photos --model small --to kat --from dog
    2 --to: no class is called 'kat'; did you mean 'cat'? There are airplane, ...
edit photos --model small --to cat --from 10
    2 --class/--from: class 10 is out of range: the network has classes 0..9
edit photos --model small --to none --from dog
    2 --to: no class is called 'none'; there are airplane, ...
edit photos --model plain --to cat --from dog
    2 --to: the network is unconditional: it has no classes
edit photos --model small --to cat --direction photos thumbs
    2 argument --direction: not allowed with argument --to
edit photos --model small --direction photos
    2 argument --direction: expected 2 arguments
edit photos --model small --direction photos empty
    2 no images in 'empty': files such as .png or .jpg are needed
edit photos --model small --direction photos text.png
    2 text.png: not a readable image (of no format that Pillow decodes)
edit photos --model small --direction photos thumbs --amount inf
    2 --amount must be a finite number; got inf
edit photos --model small --direction photos thumbs --amount much
    2 argument --amount: 'much' is not a number
edit photos --model small --strength 0.5 --guidance 2
    2 --guidance 2.0 needs class labels to guide towards
edit photos --model voices --strength 0.5
    2 --model voices is a model of sounds, not of pictures: see python -m ddim_fast.restyle
edit nowhere --model small --strength 0.5
    2 no images at 'nowhere': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
edit --model small --strength 0.5
    2 the following arguments are required: IMAGES
edit photos --model small --strength 0.5 --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
edit photos --model small --strength 0.5 --out photos
    2 --out photos is not empty (a.png and 1 more); name a folder that is new or empty
edit photos --model small --strength 0.5 --out new.png --steps 1
    2 --out new.png would be a folder of that name; name one without .png

# interpolate

interpolate --model small
    2 give two ends, or four corners; got 0
interpolate seed:1 seed:x --model small
    2 'seed:x' is no seed: write it as seed:7
interpolate seed:1 seed:99999999999999999999 --model small
    2 a seed is a whole number from 0 to 2^63 - 1; got 99999999999999999999
interpolate 1 2 --model small
    2 no images at '1': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
interpolate seed:1 photos --model small
    2 an end is one file or a seed; 'photos' holds 2
interpolate seed:1 text.png --model small
    2 text.png: not a readable image (of no format that Pillow decodes)
interpolate seed:1 empty --model small
    2 no images in 'empty': files such as .png or .jpg are needed
interpolate seed:1 tone.wav --model small
    2 tone.wav: unknown kind of file; give a folder, an image file ...
interpolate seed:1 photos/a.png --model voices
    2 photos/a.png: not a readable sound (Format not recognised.)
interpolate seed:1 seed:2 --model small --frames 1
    2 --frames must be at least 2, for both ends; got 1
interpolate seed:1 seed:2 --model small --frames 0
    2 argument --frames: '0' is not a positive whole number
interpolate seed:1 seed:2 --model small --class hrse
    2 --class: no class is called 'hrse'; did you mean 'horse'? There are airplane, ...
interpolate seed:1 seed:2 --model small --guidance 2
    2 --guidance 2.0 needs class labels to guide towards
interpolate seed:1 seed:2 --model small --fps 5
    2 --fps is an option of --video
interpolate seed:1 seed:2 --model small --factor 2
    2 --factor is an option of --video
interpolate seed:1 seed:2 --model small --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
interpolate seed:1 seed:2 --model small --out notes/new --steps 1
    2 --out notes/new: notes is a file, not a folder; name another place
interpolate seed:1 seed:2 --model small --out new.gif --steps 1
    2 --out new.gif would be a folder of that name; name one without .gif
interpolate seed:1 --video film.gif --model small
    2 --video takes the place of the ends and of --frames
interpolate --video film.gif --model small
    2 a film needs at least two frames; film.gif has 1
interpolate --video one.gif --model small
    2 a film needs at least two frames; one.gif has 1
interpolate --video nowhere.gif --model small
    2 no frames at 'nowhere.gif': neither a folder nor a file
interpolate --video text.mp4 --model small
    2 text.mp4: not a readable video
interpolate --video text.gif --model small
    2 text.gif: not a readable GIF (of no format that Pillow decodes)
interpolate --video photos/a.png --model small
    2 a film needs at least two frames; photos/a.png has 1
interpolate --video empty --model small
    2 a film needs at least two frames; empty has 0
interpolate --video notes --model small
    2 notes: not a readable video
interpolate --video photos --factor 1 --model small
    2 --factor must be at least 2, for a new frame between each two; got 1
interpolate --video photos --factor 0 --model small
    2 argument --factor: '0' is not a positive whole number
interpolate --video photos --fps 0 --out new.gif --model small
    2 --fps must be a positive number; got 0.0
interpolate --video photos --fps 51 --out new.gif --model small
    2 a GIF shows at most 50 frames a second, and this film would have 51; write an .mp4, or with --fps 50 or fewer
interpolate --video photos --fps 5 --model small
    2 --fps is for a GIF or MP4; a folder of frames has no rate
interpolate --video photos --out new.avi --model small
    2 --out: a film is a folder, or a file .gif or .mp4; got 'new.avi'
interpolate --video photos --out one.gif --model small
    2 --out one.gif exists; name another file
interpolate --video photos --out photos --model small
    2 --out photos is not empty (a.png and 1 more); name a folder that is new or empty
interpolate --video photos --model voices
    2 --video: voices is a model of sounds
interpolate --video mixed --model small --steps 1
    2 the frames of a film must have one size; in mixed the first is 16x16, and frame 2 is 8x8
without=imageio_ffmpeg interpolate --video photos --out new.mp4 --model small --steps 1
    1 video files need imageio-ffmpeg: pip install 'ddim_fast[video]'
interpolate seed:1 seed:2 --model small --frmaes 3
    2 unrecognized arguments: --frmaes 3; did you mean --frames?
interpolate --video photos --frames 3 --model small
    2 --video takes the place of the ends and of --frames
interpolate --video photos --class 10 --model small
    2 --class: class 10 is out of range: the network has classes 0..9

# restore

restore photos --model small
    2 the following arguments are required: --task
restore photos --model small --task repaint
    2 argument --task: invalid choice: 'repaint'; did you mean 'inpaint'? There are inpaint, super-resolution, colorize,
      deblur, compressed-sensing
restore photos --model small --task inpaint
    2 --task inpaint needs --mask or --rectangle, the part to fill in
restore photos --model small --task inpaint --rectangle 1,2,3
    2 argument --rectangle: '1,2,3' is no rectangle: write left, top, width and height, as 8,8,16,16
restore photos --model small --task inpaint --rectangle 10,0,7,2
    2 the rectangle 10,0,7,2 (left, top, width, height) does not lie in an image of 16 pixels by 16
restore photos --model small --task inpaint --mask nowhere.png
    2 no images at 'nowhere.png': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
restore photos --model small --task inpaint --mask thumbs/a.png
    2 photos/a.png is 16x16 pixels and --mask thumbs/a.png 8x8; a mask has ...
restore photos --model small --task inpaint --mask black.png
    2 --mask: black.png has no white pixel, so there is nothing to fill in
restore photos --model small --task inpaint --mask photos
    2 --mask is one picture; 'photos' holds 2
restore photos --model small --task inpaint --mask text.png
    2 text.png: not a readable image (of no format that Pillow decodes)
restore photos --model small --task inpaint --mask notes
    2 notes: unknown kind of file; give a folder, an image file ...
restore photos --model small --task super-resolution --resize squeeze
    2 argument --resize: invalid choice: 'squeeze' ...
restore thumbs --model small --task super-resolution --factor 0
    2 argument --factor: '0' is not a positive whole number
restore thumbs --model small --task super-resolution --factor 3
    2 images of 16x16 pixels cannot be divided by the scale factor 3
restore thumbs --model small --task super-resolution --sigma 1
    2 --sigma is an option of --task deblur, not of super-resolution
restore photos --model small --task deblur
    2 --task deblur needs --sigma, the standard deviation of the blur in pixels
restore photos --model small --task deblur --sigma 0
    2 the blur's sigma must be a positive number of pixels; got 0.0
restore photos --model small --task deblur --sigma 1 --eta 2
    2 --eta must lie in [0, 1]; got 2
restore photos --model small --task deblur --sigma 1 --noise-std -1
    2 --noise-std must be a number of 0 or more; got -1.0
restore photos --model small --task compressed-sensing
    2 --task compressed-sensing needs --degrade: there are no files of such measurements
restore photos --model small --task compressed-sensing --degrade --ratio 0
    2 the ratio of compressed sensing must lie in (0, 1]; got 0.0
restore photos --model small --task colorize --travel 0 1
    2 argument --travel: '0' is not a positive whole number
restore photos --model small --task colorize --travel 3
    2 argument --travel: expected 2 arguments
restore photos --model small --task colorize --seeds 0,0
    2 --seeds names one twice: 0,0
restore photos --model small --task colorize --num-images 0
    2 argument --num-images: '0' is not a positive whole number
restore photos --model small --task colorize --class 12
    2 --class: class 12 is out of range: the network has classes 0..9
restore photos --model plain --task colorize --class cat
    2 --class: the network is unconditional: it has no classes
restore photos --model small --task colorize --out photos
    2 --out photos is not empty (a.png and 1 more); name a folder that is new or empty
restore photos --model small --task colorize --out notes
    2 --out notes is a file; name a folder that is new or empty
restore photos --model small --task colorize --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
restore photos --model small --task colorize --out restored
    2 --out restored was begun with IMAGES sha256:..., not sha256:...; give the same settings to continue it, or name
      another --out
restore photos --model small --task colorize --out samples
    2 --out samples holds the output of sample, not of restore; name another --out
restore photos --model small --task colorize --out new.png --steps 1
    2 --out new.png would be a folder of that name; name one without .png
restore empty --model small --task colorize
    2 no images in empty: files such as .png or .jpg are needed
restore cut.png --model small --task colorize
    2 cut.png: not a readable image (image file is truncated)
restore photos --model voices --task colorize
    2 --model voices is a model of sounds, not of pictures: see python -m ddim_fast.restore_sounds
without=skimage restore photos --model small --task deblur --sigma 1 --degrade
    1 SSIM needs scikit-image: pip install 'ddim_fast[restore]'
restore photos --model small --task inpaint --mask mask.png --out restored
    2 --out restored was begun with --mask sha256:..., not sha256:...; give the same settings to continue it, or name
      another --out
restore thumbs --model small --task super-resolution --factor 2 --seeds 0,0
    2 --seeds names one twice: 0,0
restore photos --model small --task super-resolution --degrade --factor 3
    2 images of 16x16 pixels cannot be divided by the scale factor 3

# restyle

restyle tone.wav --model voices --from ann
    2 the following arguments are required: --to
restyle tone.wav --model voices --from ann --to carl
    2 --to: no class is called 'carl'; there are 0/ann, 0/bob
restyle tone.wav --model voices --from ann --to 2
    2 --to: class 2 is out of range: the network has classes 0..1
restyle tone.wav --model voices --from 0 --to bob
    2 --from: '0' means 2 classes; name one of 0/ann, 0/bob
restyle tone.wav --model voices --to bob
    2 the recordings have no class: give one by --from, or say --from none
restyle nowhere.wav --model voices --from ann --to bob
    2 no sounds at 'nowhere.wav': not a folder, a sound file or a Parquet file
restyle text.wav --model voices --from ann --to bob
    2 text.wav: not a readable sound (Format not recognised.)
restyle photos --model voices --from ann --to bob
    2 no sounds in 'photos': files such as .wav or .flac are needed
restyle fast.wav --model voices --from ann --to bob
    2 fast.wav has 8000 samples a second, the model's sounds have 4000; --convert resamples it
restyle stereo.wav --model voices --from ann --to bob
    2 stereo.wav has 2 channels, the model's sounds have one; --convert mixes them down
restyle tone.wav --model small --from cat --to dog
    2 --model small makes images, not sounds; see python -m ddim_fast.edit
restyle tone.wav --model voices --from ann --to bob --loudness-std 0
    2 the standard deviation of the loudness must be positive, in decibels; got 0.0
restyle tone.wav --model voices --from ann --to bob --loudness-std loud
    2 argument --loudness-std: 'loud' is not a number
restyle tone.wav --model voices --from ann --to bob --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
restyle tone.wav --model voices --from ann --to bob --guidance nan
    2 --guidance must be a finite number, or one for each step; got nan
restyle tone.wav --model voices --form ann --to bob
    2 unrecognized arguments: --form ann; did you mean --from?

# restore_sounds

restore_sounds tone.wav --model voices
    2 one of the arguments --gap --cutoff is required
restore_sounds tone.wav --model voices --gap 0.2
    2 argument --gap: expected 2 arguments
restore_sounds tone.wav --model voices --gap 0.3 0.2
    2 a gap has a start and a later end, from 0 to 0.512 s; got 0.3 and 0.2
restore_sounds tone.wav --model voices --gap 0.1 0.2 --cutoff 500
    2 argument --cutoff: not allowed with argument --gap
restore_sounds tone.wav --model voices --cutoff 0
    2 a cutoff of 0 Hz leaves nothing to restore from; name one from 197 to 2000 Hz
restore_sounds tone.wav --model voices --cutoff 9000
    2 a cutoff of 9000 Hz leaves nothing to restore; name one from 197 to 2000 Hz
restore_sounds tone.wav --model voices --cutoff 500 --class zoe
    2 --class: no class is called 'zoe'; there are 0/ann, 0/bob
restore_sounds tone.wav --model voices --cutoff 500 --seed -1
    2 a seed is a whole number from 0 to 2^63 - 1; got -1
restore_sounds tone.wav --model small --cutoff 500
    2 --model small makes images, not sounds
restore_sounds nowhere.wav --model voices --cutoff 500
    2 no sounds at 'nowhere.wav': not a folder, a sound file or a Parquet file
restore_sounds tone.wav --model voices --cutoff 500 --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
restore_sounds photos/a.png --model voices --cutoff 500
    2 photos/a.png: not a readable sound (Format not recognised.)

# evaluate

evaluate
    2 nothing to measure: give --reference, --trajectory-error, --reconstruction, --loss, --fit-timesteps,
      --fit-solver, --fetch-inception
evaluate --fit-solver 1 --model small
    2 --fit-solver 1: the steps are at least 2 and fewer than --teacher-steps 20
evaluate --trajectory-error --solver fitted --steps 5 --model small
    2 --solver fitted: none has been fitted to this model; fit one by python -m ddim_fast.evaluate --fit-solver
evaluate --trajectory-eror --model small
    2 unrecognized arguments: --trajectory-eror; did you mean --trajectory-error?
evaluate --loss --model small
    2 --reconstruction and --loss need images that the model was not trained on: --data SPEC
evaluate --loss --data nowhere --model small
    2 no images at 'nowhere': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
evaluate --loss --data empty --model small
    2 no images in 'empty': files such as .png or .jpg are needed
evaluate --loss --data text.parquet --model small
    2 text.parquet: not a whole Parquet file ...
evaluate --loss --data text-idx3-ubyte --model small
    2 text-idx3-ubyte: not a whole IDX file ...
evaluate --loss --data photos --class 7 --model small
    2 --class is for sampled images (--reference or --trajectory-error); --data has classes of its own
evaluate --loss --data photos --num-images 99 --model small
    2 photos holds 2 images, fewer than the 99 of --num-images
evaluate --reconstruction --data photos --eta 1 --model small
    2 --reconstruction needs deterministic DDIM: --solver ddim, --eta 0, no --tolerance, no --guidance
evaluate --images photos --loss --data photos
    2 --images can be measured against --reference only; the rest needs a --model
evaluate --reference photos --num-images 0 --model small
    2 argument --num-images: '0' is not a positive whole number
evaluate --reference photos --num-images 1 --model small
    2 --num-images 1: a distribution of images needs at least 2
evaluate --reference photos --model small
    2 there is no feature network at ...cache/ddim_fast/inception: --fetch-inception downloads it, --inception names one
      that is there
evaluate --reference photos --inception absent --model small
    2 there is no feature network at absent: --fetch-inception downloads it, --inception names one that is there
evaluate --reference photos --inception notes --model small
    2 notes: not a whole file of tensors; copy or download it again
evaluate --reference photos --inception empty --model small
    2 empty is not a checkpoint: it has no inception-2015-12-05.safetensors
evaluate --reference photos --inception text.safetensors --model small
    2 text.safetensors: not a whole safetensors file (... header too large); copy or download it again
evaluate --trajectory-error --model nobody
    2 unknown model 'nobody': neither a folder or file nor a packaged model (cifar10-64, ...)
evaluate --trajectory-error --model latent
    2 --model latent is a model of an autoencoder's latents, not of images: sample it with --out FILE.npz, and give that
      to --images
evaluate --trajectory-error --model truncated
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
evaluate --trajectory-error --model small --solver euler
    2 argument --solver: unknown name 'euler'; there are ddim, ddpm, dpm-solver++, ... heun
evaluate --trajectory-error --model small --spacing quadratik
    2 argument --spacing: unknown name 'quadratik'; there are linear, quadratic, ...
evaluate --trajectory-error --model small --eta 0,1
    2 --trajectory-error needs a deterministic sampler: --eta 0 and neither --solver ddpm nor consistency
evaluate --trajectory-error --model small --eta much
    2 argument --eta: 'much' is neither a number in [0, 1] nor 'sigma-hat'
evaluate --trajectory-error --model small --solver unipc --eta 1
    2 --eta other than 0 needs --solver ddim, so there is no setting to measure
evaluate --trajectory-error --model small --tolerance small
    2 argument --tolerance: 'small' is not a list of numbers such as 0.02,0.1
evaluate --trajectory-error --model small --tolerance -1
    2 --tolerance must be a positive number; got -1.0
evaluate --trajectory-error --model small --steps 0
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got 0
evaluate --trajectory-error --model small --steps 5-
    2 argument --steps: '5-' is not a list of whole numbers and ranges such as 0-63 or 1,5,7-9
evaluate --trajectory-error --model small --seed -1
    2 argument --seed: '-1' is not a whole number from 0 to 2^63 - 1
evaluate --trajectory-error --model small --steps 2 --guidance 1,2
    2 --trajectory-error compares runs of different steps; give --guidance one scale
evaluate --fit-solver 2 --model small --guidance 1,2
    2 --fit-solver compares runs of different steps; give --guidance one scale
evaluate --trajectory-error --model small --guidance-interval 300 600
    2 --guidance-interval limits --guidance; give its scale, such as --guidance 2, as well
evaluate --trajectory-error --model small --guidance 2 --guidance-interval 600 300
    2 --guidance-interval must be two timesteps, the lower one first, from 0 to 999; got [600, 300]
evaluate --trajectory-error --model small --guide small
    2 --guide is what --guidance leads away from; give its scale, such as --guidance 2, as well
evaluate --trajectory-error --model plain --guidance 2
    2 --guidance: plain is unconditional, so guidance needs a --guide
evaluate --trajectory-error --model small --guide voices --guidance 2
    2 the guide must be of the same kind as the network: its image_shape is (4, 8, 8), not (3, 16, 16)
evaluate --trajectory-error --model small --class hrse
    2 --class: no class is called 'hrse'; did you mean 'horse'? There are airplane, ...
evaluate --trajectory-error --model small --spacing adaptive
    2 --spacing adaptive: no timesteps have been fitted to this model and ddim; fit them once by python -m
      ddim_fast.evaluate --fit-timesteps --model MODEL
evaluate --trajectory-error --model small --out album
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
evaluate --trajectory-error --model small --out notes
    2 --out notes is a file; name a folder that is new or empty
evaluate --trajectory-error --model small --out notes/new --num-images 1 --steps 1
    2 --out notes/new: notes is a file, not a folder; name another place
evaluate --trajectory-error --model small --device tpu
    2 unknown device 'tpu'; choose auto, cpu or cuda
evaluate --trajectory-error --model small --batch-size 0
    2 argument --batch-size: '0' is not a positive whole number
evaluate --trajectory-error --modle small
    2 unrecognized arguments: --modle small; did you mean --model?
evaluate --reference photos --solver euler
    2 argument --solver: unknown name 'euler'; there are ddim, ddpm, dpm-solver++, ... heun

# export

export
    2 the following arguments are required: --to, --out
export --to onnx --model small
    2 the following arguments are required: --out
export --to tensorrt --model small --out new
    2 argument --to: invalid choice: 'tensorrt'; there are checkpoint, stage, diffusers, onnx
export --to onxx --model small --out new
    2 argument --to: invalid choice: 'onxx'; did you mean 'onnx'? There are checkpoint, stage, diffusers, onnx
export --to diffusers --model small --out new
    2 --model small has 10 classes, and a DDIMPipeline gives its network none: choose one by --class N or --class none;
      --class all writes the network with all, for loops of your own
export --to diffusers --model nobody --out new --class 1
    2 unknown model 'nobody': neither a folder or file nor a packaged model (cifar10-64, ...)
export --to diffusers --model small --out new --class 10
    2 --class: class 10 is out of range: the network has classes 0..9
export --to diffusers --model small --out new --class hrse
    2 --class: no class is called 'hrse'; did you mean 'horse'? There are airplane, ...
export --to diffusers --model plain --out new --class cat
    2 --class: the network is unconditional: it has no classes
export --to diffusers --model small --out album --class all
    2 --out album is not empty (holiday.jpg); name a folder that is new or empty
export --to diffusers --model small --out notes --class all
    2 --out notes is a file; name a folder that is new or empty
export --to diffusers --model small --out notes/new --class all
    2 --out notes/new: notes is a file, not a folder; name another place
export --to diffusers --model small --out new --class all --steps 5
    2 --steps is an option of --to onnx
export --to diffusers --model small --out new --class all --dtype float16
    2 --dtype is an option of --to checkpoint and --to stage and --to onnx
export --to diffusers --model voices --out new --class all
    2 --model voices makes sounds; what its images mean as sound has no place in a DDIMPipeline
export --to diffusers --model latent --out new
    2 --model latent is a model of an autoencoder's latents, not of images: other programs' formats have no place for its
      autoencoder
export --to checkpoint --model small --out new --dtype int8
    2 --dtype int8 is for --to onnx; weights of a checkpoint are float32, float16 or bfloat16
export --to checkpoint --model small --out new --ema-length 0.5
    2 the length of an average must be above 0 and at most 0.288; got 0.5
export --to checkpoint --model small --out new --ema-length 0.1
    2 there are no snapshots of averages in small/ema: train with --ema-snapshots
export --to checkpoint --model small --out new --max-shard-size 16
    2 argument --max-shard-size: '16' is not a size such as 500KB, 16MB or 2GB
export --to checkpoint --model small --out small
    2 --out small is not empty (README.md and 2 more); name a folder that is new or empty
export --to checkpoint --model truncated --out new
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
export --to checkpoint --model notes --out new
    1 notes: not a whole file of tensors; copy or download it again
export --to onnx --model small --out new --opset 7
    2 --opset must be from 18 to 23 for float32; got 7
export --to onnx --model small --out new --steps 0
    2 --steps must be a whole number from 1 to 1000, the number of training timesteps; got 0
export --to onnx --model small --out new --eta 2
    2 --eta must lie in [0, 1] or be 'sigma-hat'; got 2.0
export --to onnx --model small --out new --spacing 5,3 --steps 3
    2 --steps 3 does not match the 2 timesteps of --spacing; leave it out
export --to onnx --model small --out new --spacing adaptive
    2 --spacing adaptive: no timesteps have been fitted to this model and ddim; fit them once by python -m
      ddim_fast.evaluate --fit-timesteps --model MODEL
export --to onnx --model small --out new --clip -1
    2 --clip must be a positive number; got -1.0
export --to onnx --model small --out new --dtype bfloat16 --optimize cuda
    2 optimize='cuda' is for float32 and float16; ONNX Runtime's fused operators do not take bfloat16
export --to onnx --model small --out new --optimize tpu
    2 argument --optimize: invalid choice: 'tpu'; there are cuda
export --to onnx --model voices --out new
    2 voices makes sounds, and an ONNX export cannot hold their format; sample it with torch
without=onnxscript export --to onnx --model small --out new
    1 this needs onnxscript, which is not installed: pip install onnxscript
export --to onnx --model small --out new --unrol
    2 unrecognized arguments: --unrol; did you mean --unroll?
export --to checkpoint --model exported --out new
    1 exported is not a checkpoint: it has no config.json

# train

train
    2 the following arguments are required: --out
train --out new
    2 --data is required
train --data photos --out run
    2 --out run holds a run already; go on with --resume or choose another folder
train --data photos --out small
    2 --out small holds a checkpoint already, which is no run's; choose another folder
train --data photos --out notes --steps 1 --device cpu
    2 --out notes is a file; name a folder
train --data photos --out notes/new --steps 1 --device cpu
    2 --out notes/new: notes is a file, not a folder; name another place
train --data photos --out album --preset cifar --steps 1
    2 argument --preset: invalid choice: 'cifar'; did you mean 'cifar10-64'? There are cifar10-64, ...
train --data nowhere --out new --steps 1 --set sample_size=8
    2 no images at 'nowhere': not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)
train --data empty --out new --steps 1 --set sample_size=8
    1 no images in 'empty': files such as .png or .jpg are needed
train --data mixed --out new --steps 1 --set sample_size=16
    1 the images of a data set must all have one size, or 16 pixels each way at least; mixed/a.png is 16x16 and
      mixed/b.png is 8x8
train --data text.parquet --out new --steps 1 --set sample_size=8
    1 text.parquet: not a whole Parquet file ...
train --data text-idx3-ubyte --out new --steps 1 --set sample_size=8
    1 text-idx3-ubyte: not a whole IDX file ...
train --data whole.npz --out new --steps 1 --set sample_size=8
    1 whole.npz: unknown kind of file; give a folder, an image file ...
train --data photos --out new --steps 0
    2 argument --steps: '0' is not a positive whole number
train --data photos --out new --batch-size four
    2 argument --batch-size: 'four' is not a positive whole number
train --data photos --out new --lr -1
    2 --lr must be positive; got -1.0
train --data photos --out new --lr fast
    2 argument --lr: 'fast' is not a number
train --data photos --out new --warmup -1
    2 --warmup must be at least 0; got -1
train --data photos --out new --ema 1
    2 --ema must be in [0, 1); got 1.0
train --data photos --out new --ema nan
    2 --ema must be in [0, 1); got nan
train --data photos --out new --grad-clip 0
    2 --grad-clip must be positive; got 0.0
train --data photos --out new --dropout 1
    2 --dropout must be in [0, 1); got 1.0
train --data photos --out new --label-dropout 2
    2 --label-dropout must be in [0, 1]; got 2.0
train --data photos --out new --min-snr-gamma 0
    2 --min-snr-gamma must be positive; got 0.0
train --data photos --out new --min-snr-gamma nan
    2 --min-snr-gamma must be positive; got nan
train --data photos --out new --steps 1 --consistency 999,400
    2 --consistency tunes a diffusion model; name it by --init
train --data photos --out new --steps 1 --consistency high --init small
    2 argument --consistency: 'high' is not a list of timesteps such as 999,400
train --data photos --out new --steps 1 --consistency 400,999 --init small
    2 --consistency must be timesteps, falling, such as 999,400; got '400,999'
train --data photos --out new --steps 1 --consistency 1000,400 --init small
    2 timesteps must lie in 0..999; got 400..1000
train --data photos --out new --steps 1 --consistency 999,400 --init small --min-snr-gamma 5
    2 --min-snr-gamma is for the denoising loss; consistency weighs all its timesteps alike
train --data photos --out new --minutes 0
    2 argument --minutes: a positive number of minutes; got '0'
train --data photos --out new --minutes nan
    2 argument --minutes: a positive number of minutes; got 'nan'
train --data photos --out new --seed -1
    2 argument --seed: '-1' is not a whole number from 0 to 2^63 - 1
train --data photos --out new --recipe slow
    2 argument --recipe: invalid choice: 'slow'; there are ddpm, fast
train --data photos --out new --dtype float16
    2 argument --dtype: invalid choice: 'float16'; did you mean 'bfloat16'? There are auto, float32, bfloat16
train --data photos --out new --device tpu
    2 unknown device 'tpu'; choose auto, cpu or cuda
train --data photos --out new --set layers_per_block
    2 --set takes KEY=VALUE; got 'layers_per_block'
train --data photos --out new --set layer_per_block=1
    2 unknown configuration key 'layer_per_block'; did you mean 'layers_per_block'?
train --data photos --out new --set layers_per_block=many
    2 layers_per_block must be an integer; got 'many'
train --data photos --out new --set beta_schedule=lineer
    2 beta_schedule must be one of linear, scaled_linear, cosine, sigmoid; got 'lineer'
train --data photos --out new --set sample_size=0
    2 sample_size must be at least 1; got 0
train --data photos --out new --set norm_num_groups=7
    2 norm_num_groups must be a divisor of every level's width, 64 among them; got 7
train --data photos --out new --set base_channels=1e400
    2 base_channels must be an integer; got inf
train --data photos --out new --prediction-type eps
    2 argument --prediction-type: invalid choice: 'eps'; did you mean 'epsilon'? There are epsilon, v_prediction, sample
train --data photos --out new --class-conditional --preset grey-32
    2 --class-conditional: photos has no label for every image
train --data photos --out new --init nowhere
    2 unknown model 'nowhere': neither a folder or file nor a packaged model (cifar10-64, ...)
train --data photos --out new --init truncated
    1 truncated/model.safetensors: not a whole safetensors file (... incomplete metadata, file not fully covered); copy or
      download it again
train --data photos --out new --init small --preset grey-32
    2 --preset describes a network, and --init small is one
train --data photos --out new --init small --set base_channels=8
    2 --set base_channels describes a network, and --init small is one; only its sample_size can grow
train --data photos --out new --init small --set sample_size=48
    2 --set sample_size: --init small has 16, which can stay, or double for a model of pictures; got 48
train --data photos --out new --latents nowhere
    2 nowhere is not a checkpoint: it has no config.json
train --data photos --out new --latents small
    2 small/config.json: this describes a diffusion model, not an autoencoder; name the folder of one
train --data photos --out new --latents latent/autoencoder --preset autoencoder
    2 --latents is for training a network on latents; --preset autoencoder makes the autoencoder
train --data photos --out new --preset autoencoder --class-conditional
    2 --class-conditional is for diffusion models, not for an autoencoder
train --data photos --out new --preset autoencoder --dropout 0.1
    2 --dropout is for diffusion models, not for an autoencoder
train --out new --resume
    2 --resume: there is no run in new
train --out run --resume again
    2 argument --resume: it stands alone, or with auto; got 'again'
train --out new --resume auto
    2 --data is required
train --out small --resume
    2 --resume: there is no run in small
train --out run --resume --recipe fast
    2 --recipe fast: a run goes on with its own; begin another with another --out
train --out run --resume --latents elsewhere
    2 --latents elsewhere: a run goes on with its own; begin another with another --out
train --out run --resume --set base_channels=16
    2 --resume: the network of this run has sample_size 8, not 32; train another in another --out
train --out run --resume --init small
    2 --set attention_resolutions describes a network, and --init small is one; only its sample_size can grow
train --out run --resume --preset cifar10-64
    2 --resume: the network of this run has in_channels 1, not 3; train another in another --out
train --data photos --out new --accumulate 3
    2 --batch-size must be a multiple of 3, for accumulate 3; got 128
train --data photos --out new --shard
    2 --shard splits a network among several processes; start them by torchrun --nproc-per-node N
train --data photos --out new --shard --compile
    2 --shard does not go with compile, which needs whole weights; leave one of them out
train --data photos --out new --shard --optimizer muon
    2 --shard splits the matrices that optimizer muon needs whole; use optimizer adam, or leave it out
train --data photos --out new --accumulate 0
    2 argument --accumulate: '0' is not a positive whole number
train --data tone.wav --out new --preset digits-mel
    1 tone.wav has 4000 samples a second, the model's sounds have 8000; --convert resamples it
train --data photos --out new --preset digits-mel
    1 no sounds in 'photos': files such as .wav or .flac are needed
without=pyarrow train --data text.parquet --out new
    1 reading Parquet needs pyarrow: pip install 'ddim_fast[train]'
train --data photos --out new --ema-snapshots 0
    2 argument --ema-snapshots: '0' is not a positive whole number
train --data photos --out new --ema-snapshots 5 --preset autoencoder
    2 --ema-snapshots is for diffusion models, not for an autoencoder
train --data photos --out new --set rescale_betas_zero_snr=true
    2 ... at zero SNR ... use v_prediction
train --data photos --out new --step 3
    2 unrecognized arguments: --step 3; did you mean --steps?
"""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NETWORK = {"base_channels": 8, "channel_multipliers": (1, 2), "layers_per_block": 1, "norm_num_groups": 4}


def table(text: str) -> list[tuple[str, int, str]]:
    """Command, exit code and words of each call."""
    calls: list[tuple[str, int, str]] = []
    for line in text.splitlines():
        if line.startswith("      "):
            command, code, words = calls.pop()
            calls.append((command, code, f"{words} {line.strip()}"))
        elif line.startswith("    "):
            command, _, _ = calls.pop()
            code, _, words = line.strip().partition(" ")
            calls.append((command, int(code), words))
        elif line and not line.startswith("#"):
            calls.append((line, 0, ""))
    return calls


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with models, data and outputs, whole and damaged ones. No call may change it, so that one is enough."""
    folder = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _write_models()
        _write_data()
        _write_outputs()
    return folder


def _write_models():
    torch.manual_seed(0)
    plain = UNetConfig(**NETWORK, sample_size=16, attention_resolutions=(8,))
    UNet(plain).save_pretrained("plain")
    UNet(dataclasses.replace(plain, num_classes=10, class_names=CLASSES)).save_pretrained("small")
    of_sounds = {"sample_size": (8, 8), "in_channels": 4, "num_classes": 2, "class_names": ("0/ann", "0/bob")}
    voices = UNet(UNetConfig(**NETWORK, **of_sounds, attention_resolutions=(4,)))
    voices.audio = MEL
    voices.save_pretrained("voices")
    UNet(UNetConfig(**NETWORK, sample_size=8, in_channels=2, attention_resolutions=(4,))).save_pretrained("latent")
    layers = {"base_channels": 8, "channel_multipliers": (1, 2), "norm_num_groups": 4}
    Autoencoder(AutoencoderConfig(sample_size=16, latent_channels=2, **layers)).save_pretrained("latent/autoencoder")
    for name, damage in {
        "truncated": lambda weights, config: (weights[:-100], config),
        "zeros": lambda weights, config: (bytes(64), config),
        "no-json": lambda weights, config: (weights, config[:-20]),
        "list-json": lambda weights, config: (weights, b"[1]"),
        "unknown-key": lambda weights, config: (weights, config.replace(b'"dropout"', b'"dropuot"')),
        "wrong-type": lambda weights, config: (weights, config.replace(b'"base_channels": 8', b'"base_channels": "8"')),
        "wider": lambda weights, config: (weights, config.replace(b'"base_channels": 8', b'"base_channels": 16')),
        "deeper": lambda weights, config: (weights, config.replace(b'"layers_per_block": 1', b'"layers_per_block": 2')),
        "no-classes": lambda weights, config: (
            weights,
            re.sub(rb'"(num_classes|class_names)": [^]}]*?([]\d]),\n', b"", config),
        ),
        "no-weights": lambda weights, config: (None, config),
        "no-config": lambda weights, config: (weights, None),
    }.items():
        shutil.copytree("small", name)
        files = [Path(name, "model.safetensors"), Path(name, "config.json")]
        for file, content in zip(files, damage(*(file.read_bytes() for file in files)), strict=True):
            file.unlink() if content is None else file.write_bytes(content)
    Path("exported").mkdir()
    Path("exported/unet.onnx").write_bytes(b"no network")


def _write_data():
    rng = np.random.default_rng(0)
    large, small = ("photos/a", "photos/b", "animals/cat/a", "animals/dog/b", "mixed/a"), ("thumbs/a", "mixed/b")
    for name, size in [(name, 16) for name in large] + [(name, 8) for name in small]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(f"{name}.png")
    for name, white in (("mask.png", 255), ("black.png", 0), ("one.gif", 0), ("grid.png", 0), ("film.gif", 0)):
        Image.new("L", (16, 16), white).save(name)
    for name in ("empty", "folder.png", "texts"):
        Path(name).mkdir()
    for suffix in ("png", "wav", "npz", "parquet", "ckpt", "safetensors", "mp4", "gif"):
        Path(f"text.{suffix}").write_text("nothing of the kind")
    for name in ("text-idx3-ubyte", "notes", "texts/notes.txt"):
        Path(name).write_text("nothing of the kind")
    Path("cut.png").write_bytes(Path("photos/a.png").read_bytes()[:-300])
    Path("zero.png").touch()
    np.savez("whole.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    for name, rate, channels in (("tone", RATE, 1), ("fast", 2 * RATE, 1), ("stereo", RATE, 2)):
        with wave.open(f"{name}.wav", "wb") as file:
            file.setparams((channels, 2, rate, 0, "NONE", None))
            file.writeframes((np.repeat(tone(300, 1500), channels) * 32767).astype("<i2").tobytes())


def _write_outputs():
    Path("album").mkdir()
    Image.new("RGB", (16, 16)).save("album/holiday.jpg")
    Path("bad-record").mkdir()
    Path("bad-record/record.json").write_text("{")
    network = "sample_size=8 base_channels=8 channel_multipliers=[1,2] layers_per_block=1 attention_resolutions=[4]"
    network += " norm_num_groups=4 num_train_timesteps=2"  # two steps make a grid
    for command in (
        "sample --model small --steps 2 --seeds 0-1 --quiet --out samples",
        "sample --model small --steps 2 --seeds 0-1 --quiet --out samples.npz",
        "restore --task inpaint --rectangle 0,0,4,4 photos --model small --steps 1 --quiet --out restored",
        f"train --data photos --preset grey-32 --set {network} --batch-size 2 --steps 1 --device cpu --quiet --out run",
    ):
        with pytest.MonkeyPatch.context() as patch:
            assert _run(command, patch) == 0


def _run(line, patch):
    """The exit code of a command, in whose line NAME=VALUE comes before it, and without=PACKAGE."""
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        if name == "without":
            for module in [value, *(module for module in sys.modules if module.startswith(f"{value}."))]:
                patch.setitem(sys.modules, module, None)
        else:
            patch.setenv(name, value)
    command = words[0]
    patch.setattr(sys, "argv", words)
    place = {"ddim_fast": "ddim_fast.__main__", "models": "ddim_fast.cli.models"}.get(command, f"ddim_fast.{command}")
    main = all_commands.main if command == "ddim_fast" else importlib.import_module(place).main
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def call(prepared, monkeypatch, capsys, tmp_path):
    """A function that runs a command in the prepared folder, which stays as it is -> exit code, stderr."""
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = _contents(prepared)

    def run(line):
        with pytest.MonkeyPatch.context() as patch:
            code = _run(line, patch)
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    yield run
    after = _contents(prepared)
    assert sorted(after.keys() ^ before.keys()) == [] and [path for path in before if before[path] != after[path]] == []
    assert not (tmp_path / "cache" / "ddim_fast").exists()


@pytest.mark.parametrize(("line", "code", "words"), [pytest.param(*row, id=row[0]) for row in table(CALLS)])
def test_a_wrong_call_is_one_line_and_changes_nothing(line, code, words, call, prepared):
    found, err = call(line)
    text = err.replace(f"{prepared}/", "")  # where a path has been made absolute
    assert found == code and text.count("\n") == 1, text
    assert re.search(".*".join(re.escape(part.strip()) for part in words.split("...")), text), text
    assert not re.search(r"0x[0-9a-f]{6}|Traceback|\b[A-Z]\w+Error\b", text), text


def test_there_are_two_hundred():
    assert len(table(CALLS)) >= 200 and len({line for line, _, _ in table(CALLS)}) == len(table(CALLS))


SMALL = "--model small --steps 1 --quiet"
WRITING = (
    f"sample {SMALL} --seeds 0",
    f"sample {SMALL} --seeds 0 --out new.npz",
    f"reconstruct photos {SMALL}",
    f"edit photos {SMALL} --strength 0.5",
    f"interpolate seed:1 seed:2 {SMALL}",
    f"restore photos {SMALL} --task colorize",
    "restyle tone.wav --model voices --from ann --to bob --steps 1 --quiet",
    "restore_sounds tone.wav --model voices --cutoff 500 --steps 1 --quiet",
    "export --to checkpoint --model small --out new",
    "export --to diffusers --model plain --out new",
)


@pytest.mark.parametrize("line", WRITING)
def test_an_interrupt_before_anything_is_written_leaves_nothing(line, call, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", interrupt)
        patch.setattr(tempfile, "mkstemp", interrupt)
        patch.setattr(UNet, "from_pretrained", interrupt)
        assert call(line) == (130, "")


@pytest.mark.parametrize("line", [line for line in WRITING if not line.startswith(("sample", "restore "))])
def test_an_interrupt_while_a_folder_is_written_leaves_nothing(line, call, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert call(line) == (130, "")


@pytest.mark.parametrize("line", ["sample --model small --steps 1 --quiet --seeds 0-2 --batch-size 1 --out new", WRITING[5]])
def test_an_interrupted_job_says_how_to_go_on(line, call, prepared, monkeypatch):
    replace, files = os.replace, []

    def interrupt(*places):
        files.append(places)
        if len(files) == 3:
            raise KeyboardInterrupt
        replace(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        code, err = call(line)
    (new,) = (place for place in map(Path, ("new", "restored-2")) if place.exists())
    assert code == 130 and err.count("\n") == 1
    assert re.fullmatch(rf"stopped: {new} holds \d of \d images; the same command continues it\n", err)
    assert json.loads((new / "record.json").read_text())["finished"] is False
    shutil.rmtree(new)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Permission denied: ... name a place that you may read and write"),
        (errno.EROFS, "Read-only file system: ... name a place on another disk"),
        (errno.ENOSPC, "No space left on device: ... free some space, or name a place on another disk"),
    ],
)
@pytest.mark.parametrize("line", WRITING)
def test_a_place_where_nothing_can_be_written(line, number, words, call, monkeypatch):
    """As for a user who may not write there: for root, who runs the tests of a container, all places can be written to."""

    def refuse(*arguments, dir=None, prefix=None, **options):
        raise OSError(number, os.strerror(number), str(Path(dir, prefix)))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", refuse)
        patch.setattr(tempfile, "mkstemp", refuse)
        code, err = call(line)
    first, last = words.split(" ... ")
    assert code == 1 and err.startswith(f"error: {first}") and err.endswith(f"{last}\n") and err.count("\n") == 1
    assert "/." not in err and "'." not in err  # no temporary name


@pytest.mark.parametrize("line", WRITING[:2])
def test_memory_that_runs_out_is_one_line(line, call, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("Unable to allocate 8.00 TiB")

    with monkeypatch.context() as patch:
        patch.setattr(UNet, "from_pretrained", fail)
        code, err = call(line)
    assert code == 1
    assert err == "error: not enough memory (Unable to allocate 8.00 TiB): ask for fewer images, or a smaller --batch-size\n"
