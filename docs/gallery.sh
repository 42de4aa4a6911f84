#!/usr/bin/env bash
# Makes the pictures of the documentation again, but for those of the web page, of latents and of measurements:
#
#     bash docs/gallery.sh FASHION_MNIST SPOKEN_DIGITS CIFAR10
#
# FASHION_MNIST is the folder of its four IDX files, SPOKEN_DIGITS the Free Spoken Digit Dataset as a Parquet file (audio, label,
# speaker), CIFAR10 its test images as a Parquet file (image, label).
set -euo pipefail
data=$(realpath "$1")
digits=$(realpath "$2")
photographs=$(realpath "$3")
docs=$(realpath "$(dirname "$0")")
pictures=$docs/gallery
packaged=$(realpath "$docs/../ddim_fast/models/packaged")
mkdir -p "$pictures"
cd "$(mktemp -d)"
run() { python -m "ddim_fast.$1" "${@:2}" --quiet; }
fashion() { run "$@" --model fashion-mnist; }

# The first eight test images of each class, as photographs might lie there: a folder a class.
python - "$data" << 'PYTHON'
import sys
from pathlib import Path
from PIL import Image
from ddim_fast.data.images import load_images

data = load_images(f"{sys.argv[1]}/t10k-images-idx3-ubyte.gz", 1, 32)
for label in range(10):
    for i in (data.labels == label).nonzero()[:8, 0].tolist():
        path = Path(f"fashion/{label}/{i:05d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(path)
    Path(f"one/{label}").mkdir(parents=True)
    Image.open(min(Path(f"fashion/{label}").iterdir())).save(f"one/{label}/first.png")
# A film: a boot walks to the right, two pixels a frame.
Path("walk").mkdir()
boot = Image.open("one/9/first.png")
for frame in range(5):
    moved = Image.new("L", boot.size)
    moved.paste(boot, (2 * frame - 4, 0))
    moved.save(f"walk/{frame}.png")
PYTHON

run sample --out samples --grid "$packaged/cifar10-64/samples.png"
fashion sample --out fashion-samples --grid "$packaged/fashion-mnist/samples.png"

fashion reconstruct one --steps 50 --out reconstruction
cp reconstruction/comparison.png "$pictures/reconstruction.png"

fashion interpolate one/3/first.png one/0/first.png --exact --frames 9 --out ends
cp ends/grid.png "$pictures/interpolation.png"
cp ends/film.gif "$pictures/interpolation.gif"
fashion interpolate one/9/first.png one/5/first.png one/8/first.png one/1/first.png --exact --frames 7 --out corners
cp corners/grid.png "$pictures/corners.png"
fashion interpolate --video walk --factor 4 --class 9 --exact --out walk.gif
cp walk.gif "$pictures"

restore() { fashion restore --task "$@" --degrade --steps 10 --travel 1 5; }
restore inpaint fashion/8 --class 8 --rectangle 10,10,12,12 --out inpaint
restore super-resolution fashion/7 --class 7 --factor 4 --out small
restore deblur fashion/2 --class 2 --sigma 1.5 --out blurred
restore compressed-sensing fashion/3 --class 3 --ratio 0.25 --out sensed
run restore --task colorize "$photographs" --num-images 20 --degrade --steps 10 --travel 1 5 --out colorized
for task in inpaint small blurred sensed colorized; do cp $task/comparison.png "$pictures/$task.png"; done

fashion sample --class 9 --guidance 3 --seeds 0-9 --out boots --grid "$pictures/guided.png"
fashion edit fashion/7 --strength 0.6 --class 9 --guidance 2 --out strokes
fashion edit fashion/7 --from 7 --to 9 --guidance 2 --strength 0.6 --out swapped
for edit in strokes swapped; do cp $edit/comparison.png "$pictures/$edit.png"; done

# Ten test images of sneakers and of dresses, and training images of dresses: 64 with sleeves and 64 without, by how many pixels are lit
# beside the body.
python - "$data" << 'PYTHON'
import sys
from pathlib import Path
from PIL import Image
from ddim_fast.data.images import load_images

def save(folder, data, which):
    Path(folder).mkdir()
    for i in which:
        Image.fromarray(data.images[i, 0].numpy()).save(f"{folder}/{i:05d}.png")

test = load_images(f"{sys.argv[1]}/t10k-images-idx3-ubyte.gz", 1, 32)
for name, label in (("sneakers", 7), ("dresses", 3)):
    save(name, test, (test.labels == label).nonzero()[:10, 0].tolist())
train = load_images(f"{sys.argv[1]}/train-images-idx3-ubyte.gz", 1, 32)
dresses = (train.labels[:20000] == 3).nonzero()[:, 0]
lit = (train.images[dresses, 0, 6:16, 2:10] > 0).flatten(1).sum(1)
by_sleeves = dresses[lit.argsort(stable=True)].tolist()
save("sleeveless", train, by_sleeves[:64])
save("long", train, by_sleeves[-64:])
PYTHON
for strength in 0.6 1; do fashion edit sneakers --from 7 --to 9 --guidance 2 --strength $strength --out boots-$strength; done
fashion edit sneakers --strength 0.6 --class 9 --guidance 2 --out boots-drawn
fashion edit dresses --class 3 --direction long sleeveless --out sleeves
python - "$docs/editing.png" << 'PYTHON'
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from ddim_fast.io.pictures import image_grid, save_image

folders = ("sneakers", "boots-0.6", "boots-1", "boots-drawn", "dresses", "sleeves")
pages = [sorted(path for path in Path(folder).glob("*.png") if path.stem.isdigit()) for folder in folders]
pixels = np.array([Image.open(path) for page in pages for path in page], np.float32)[:, None]
save_image(Path(sys.argv[1]), image_grid(pixels / 127.5 - 1), scale=2)
PYTHON

# The first recording of each digit by one speaker.
python - "$digits" << 'PYTHON'
import sys
from pathlib import Path
import pyarrow.parquet

for row in pyarrow.parquet.read_table(sys.argv[1]).to_pylist():
    path = Path(f"jackson/{row['label']}/jackson/first.flac")
    if row["speaker"] == "jackson" and not path.exists():
        path.parent.mkdir(parents=True)
        path.write_bytes(row["audio"]["bytes"])
PYTHON
run sample --model spoken-digits --class 7 --guidance 3 --seeds 0-5 --out sevens --grid "$pictures/sevens.png"
cp sevens/000001.wav "$pictures/seven.wav"
run restyle jackson --model spoken-digits --to 7/theo --guidance 3 --out restyled
cp restyled/comparison.png "$pictures/restyled.png"
run restore_sounds jackson --model spoken-digits --gap 0.45 0.55 --guidance 2 --out filled
cp filled/comparison.png "$pictures/filled.png"

python "$docs/film.py" "$docs/first-minute.gif"
