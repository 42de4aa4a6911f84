"""Damaged files of data sets, Parquet, IDX and .npz, and of their statistics."""

import contextlib
import gzip
import io
import json
import struct
import tarfile
import zipfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from ddim_fast.data.images import load_images
from ddim_fast.data.sound_files import load_sounds
from ddim_fast.evaluation.inception import FeatureNetwork
from ddim_fast.evaluation.pictures import read_pictures
from ddim_fast.evaluation.reference import load_reference
from ddim_fast.evaluation.shards import Shards, make_shards
from ddim_fast.io.processes import Processes
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes
from tests.helpers.tones import MEL, RATE, tone

NETWORK = FeatureNetwork(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(12, 6)), "tiny", 6, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder):
    images = [{"bytes": encoded(array), "path": f"{i}.png"} for i, array in enumerate(PIXELS)]
    paths = []
    for i, (compression, label) in enumerate(
        (
            ("snappy", [0, 1, 2, 0, 1, 2]),
            ("zstd", pa.array([0, 1, 2] * 2, pa.uint8())),
            ("gzip", None),
            ("brotli", [0] * 6),
            ("none", None),
        )
    ):
        columns = {"image": images, "caption": list("abcdef"), **({} if label is None else {"label": label})}
        paths.append(folder / f"{i}.parquet")
        options = {"use_dictionary": i % 2 == 0, "row_group_size": 2 + i, "data_page_version": f"{1 + i % 2}.0"}
        pq.write_table(pa.table(columns), paths[-1], compression=compression, **options)
    return paths


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder):
    paths = [folder / "train-images-idx3-ubyte", folder / "train-labels.idx1-ubyte.gz"]
    paths[0].write_bytes(idx(PIXELS[..., 0]))
    paths[1].write_bytes(gzip.compress(idx(np.arange(6, dtype=np.uint8)), mtime=0))
    (folder / "zipped").mkdir()
    for name, array in (("images.idx3.gz", PIXELS[..., 0]), ("labels.idx1.gz", np.arange(6, dtype=np.uint8))):
        paths.append(folder / "zipped" / name)
        paths[-1].write_bytes(gzip.compress(idx(array), mtime=0))
    return paths


def read_idx(path):
    images = path.parent / path.name.replace("labels", "images").replace("idx1", "idx3")
    return load_images(str(images if images.is_file() else path.parent), 1, 8)


def damage_idx(random, data):
    """At times what is in the archive rather than the archive."""
    if data.startswith(b"\x1f\x8b") and random.random() < 0.7:
        return gzip.compress(mutate_bytes(random, gzip.decompress(data)), mtime=0)
    return mutate_bytes(random, data)


def write_npz(folder):
    np.savez(folder / "a.npz", arr_0=PIXELS, arr_1=np.arange(6))
    np.savez_compressed(folder / "b.npz", arr_0=PIXELS[..., :1])
    return [folder / "a.npz", folder / "b.npz"]


def damage_npz(random, data):
    """At times the arrays in the archive rather than the archive."""
    if random.random() < 0.5:
        return mutate_bytes(random, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            new.writestr(zipfile.ZipInfo(member.filename), mutate_bytes(random, old.read(member)), member.compress_type)
    return buffer.getvalue()


def write_statistics(folder):
    features = np.random.default_rng(0).normal(size=(20, 6))
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    ours = {"count": 20, "network": "tiny", "resolution": (8, 8), "features": features.astype(np.float32)}
    np.savez(folder / "ours.npz", mu=mean, sigma_upper=covariance[np.triu_indices(6)], **ours)
    np.savez_compressed(folder / "others.npz", mu=mean, sigma=covariance, arr_0=PIXELS)
    return [folder / "ours.npz", folder / "others.npz"]


def read_statistics(path):
    load_reference(str(path), (3, 8, 8), NETWORK, Processes())


def write_cached(folder):
    """What the cache folder keeps of a data set: its statistics, and parts of them that were not finished."""
    np.savez(folder / "pictures.npz", arr_0=PIXELS)
    read_statistics(folder / "pictures.npz")
    return [next((folder / ".cache").rglob("*.npz"))]


def read_cached(path):
    """Either is the same as when it is computed anew."""
    folder = next(parent for parent in path.parents if parent.name == ".cache").parent
    load_reference(str(folder / "pictures.npz"), (3, 8, 8), NETWORK, Processes())


def write_parts(folder):
    parts = Shards(folder / "parts", 6, 4, size=3)
    for k in range(len(parts)):
        parts.write(k, np.full((3, 4), k, np.float32))
    return sorted((folder / "parts").iterdir())


def read_parts(path):
    """What is not whole is made again."""
    parts = Shards(path.parent, 6, 4, size=3)
    make_shards(parts, lambda numbers: torch.zeros(len(numbers), 4), Processes())
    assert parts.all().shape == (6, 4)


def write_sound_parquet(folder):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(500), RATE, format="FLAC")
    sounds = [{"bytes": buffer.getvalue(), "path": f"{i}.flac"} for i in range(4)]
    table = pa.table({"audio": sounds, "label": [0, 1, 0, 1], "speaker": list("abab")})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / "a.parquet")
    return [folder / "a.parquet"]


def write_tar(folder):
    for name, kind in (("a.tar", tarfile.USTAR_FORMAT), ("b.tar", tarfile.PAX_FORMAT), ("c.tar", tarfile.GNU_FORMAT)):
        with tarfile.open(folder / name, "w", format=kind) as archive:
            for i, array in enumerate(PIXELS):
                key = f"{'long' * 40}é/{i}"
                for member, data in ((f"{key}.png", encoded(array)), (f"{key}.json", json.dumps({"label": i % 3}).encode())):
                    header = tarfile.TarInfo(member if kind != tarfile.USTAR_FORMAT else member[-7:])
                    header.size = len(data)
                    archive.addfile(header, io.BytesIO(data))
    return [folder / name for name in ("a.tar", "b.tar", "c.tar")]


def read_tar(path):
    load_images(str(path), 3, 8, max_bad=1)


def write_decoded(folder):
    """What the cache folder keeps of a data set that does not fit into memory."""
    with (
        mock.patch("ddim_fast.data.images.available_memory", lambda: 0),
        mock.patch("ddim_fast.data.decoded._BLOCK", 2 * PIXELS[0].size),
    ):
        for i, array in enumerate(PIXELS):
            (folder / f"{i}.png").write_bytes(encoded(array))
        load_images(str(folder), 3, 8, mapped=True)
    found = sorted((folder / ".cache").rglob("*.*"))
    return [path for path in found if path.is_file()]


def read_decoded(path):
    """The images are the same as when they are decoded anew."""
    folder = next(parent for parent in path.parents if parent.name == ".cache").parent
    with contextlib.redirect_stderr(io.StringIO()):
        images = load_images(str(folder), 3, 8, mapped=True).images
    assert torch.equal(images, torch.from_numpy(PIXELS).movedim(-1, 1))


PARQUET = Fuzzer("Parquet", write_parquet, lambda path: load_images(str(path), 3, 8), mutate_bytes)
IDX = Fuzzer("IDX", write_idx, read_idx, damage_idx)
TAR = Fuzzer("tar", write_tar, read_tar, mutate_bytes)
DECODED = Fuzzer("decoded images", write_decoded, read_decoded, mutate_bytes)
NPZ = Fuzzer("npz", write_npz, lambda path: read_pictures(str(path)), damage_npz)
STATISTICS = Fuzzer("statistics", write_statistics, read_statistics, damage_npz)
CACHED = Fuzzer("cached statistics", write_cached, read_cached, damage_npz)
PARTS = Fuzzer("parts", write_parts, read_parts, mutate_bytes)
SOUNDS = Fuzzer("Parquet of sounds", write_sound_parquet, lambda path: load_sounds(str(path), MEL), mutate_bytes)


def test_damaged_parquet_is_refused_by_name():
    PARQUET.check(300)


def test_a_damaged_idx_file_is_refused_by_name():
    IDX.check(400)


def test_a_damaged_tar_file_is_refused_by_name():
    TAR.check(300)


def test_a_damaged_npz_file_is_refused_by_name():
    NPZ.check(400)


def test_damaged_statistics_are_refused_by_name():
    STATISTICS.check(300)


@pytest.mark.parametrize("fuzzer", (CACHED, PARTS, DECODED), ids=lambda fuzzer: fuzzer.name)
def test_what_is_damaged_and_can_be_made_again_is(fuzzer):
    outcome = fuzzer.run(100)
    assert outcome.read == 100, outcome


@pytest.mark.slow
def test_damaged_parquet_of_sounds_is_refused_by_name():
    SOUNDS.check(100)


if __name__ == "__main__":
    main(PARQUET, IDX, TAR, DECODED, NPZ, STATISTICS, CACHED, PARTS, SOUNDS)
