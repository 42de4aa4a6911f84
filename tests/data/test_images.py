import datetime
import gzip
import io
import json
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddim_fast.data.images import ImageSet, load_images, native_shape, read_images, to_unit_range


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_parquet(path, arrays, **columns) -> None:
    images = [{"bytes": encoded(a), "path": f"{i}.png"} for i, a in enumerate(arrays)]
    pq.write_table(pa.table({"image": images, **columns}), path)


def as_tensor(arrays) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1)


def test_a_folder_of_images_is_read_in_the_order_of_names(tmp_path):
    arrays = [pixels(i, 8, 8, 3) for i in range(3)]
    for name, array in zip(["b.png", "a.PNG", "c.bmp"], arrays, strict=True):
        (tmp_path / name).write_bytes(encoded(array, name[-3:]))
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_images(str(tmp_path), 3, 8)
    assert data.labels is None and len(data) == 3
    assert data.images.dtype == torch.uint8
    assert torch.equal(data.images, as_tensor([arrays[1], arrays[0], arrays[2]]))


def test_folders_in_a_folder_are_classes(tmp_path):
    for name, label in (("dog", 1), ("cat", 0), ("zebra", 2)):
        (tmp_path / name / "more").mkdir(parents=True)
        Image.new("RGB", (8, 8), (label, 0, 0)).save(tmp_path / name / "1.png")
        Image.new("RGB", (8, 8), (label, 9, 9)).save(tmp_path / name / "more" / "2.png")
    data = load_images(str(tmp_path), 3, 8)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.labels.dtype == torch.int64
    assert data.images[:, 0, 0, 0].tolist() == data.labels.tolist()


@pytest.mark.parametrize(
    "folders, class_names, labels, names",
    [
        (["dog", "cat"], None, [0, 1], ("cat", "dog")),
        (["0", "1"], None, [0, 1], None),
        (["2", "10"], None, [1, 0], ("2", "10")),
        (["Dog", "cat"], ("bird", "cat", "dog"), [2, 1], ("bird", "cat", "dog")),
        (["T-shirt", "shirt"], ("T-shirt/top", "trouser", "shirt"), [0, 2], ("T-shirt/top", "trouser", "shirt")),
        (["cat", "horse"], ("bird", "cat", "dog"), [0, 1], ("cat", "horse")),  # of other classes than the model's
        (["a"], ("a/b", "a/c"), [0], ("a",)),  # which of two?
    ],
)
def test_folders_called_by_names_are_the_classes_of_a_model(folders, class_names, labels, names, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    data = load_images(str(tmp_path), 3, 8, class_names=class_names)
    assert data.labels.tolist() == labels and data.class_names == names
    rows = [label for _, _, label in read_images(str(tmp_path), class_names=class_names)]
    assert rows == labels


@pytest.mark.parametrize(
    "folders, num_classes, labels",
    [
        (["10", "9", "2"], None, [2, 1, 0]),
        (["4", "7"], None, [0, 1]),
        (["4", "7"], 10, [4, 7]),
        (["2019", "2020"], 2, [0, 1]),
        (["2019", "2020"], 10, None),
        (["garden", "holiday"], 10, None),
        (["cat", "dog"], 2, [0, 1]),
    ],
)
def test_folders_called_by_numbers_are_the_classes_of_a_model(folders, num_classes, labels, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    data = load_images(str(tmp_path), 3, 8, num_classes=num_classes)
    in_order = None if labels is None else [labels[folders.index(name)] for name in sorted(folders)]
    assert (None if data.labels is None else data.labels.tolist()) == in_order


@pytest.mark.parametrize(
    "leftover", ["empty/", "captions/1.txt", "__MACOSX/a/._1.png", "._a/1.png", ".ipynb_checkpoints/1.png", "@eaDir/1.png"]
)
def test_folders_without_pictures_are_no_classes(leftover, tmp_path):
    for name in ("b", "d"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
        (tmp_path / name / "._1.png").write_bytes(b"a Mac's notes on 1.png")
    for place in (tmp_path, tmp_path / "b"):
        (place / leftover).parent.mkdir(parents=True, exist_ok=True)
        if not leftover.endswith("/"):
            Image.new("L", (8, 8)).save(place / leftover, "PNG")
        else:
            (place / leftover).mkdir()
    for num_classes in (None, 2):
        assert load_images(str(tmp_path), 1, 8, num_classes=num_classes).labels.tolist() == [0, 1]


def test_folders_without_pictures_are_named_once(tmp_path):
    for name in ("2", "5", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "caption.txt").touch()
    for name in ("2", "7"):
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
    with pytest.warns(UserWarning) as warned:
        assert load_images(str(tmp_path), 1, 8).labels.tolist() == [0, 1]
        load_images(str(tmp_path), 1, 8)
    assert [str(w.message).removeprefix(f"{tmp_path}: ") for w in warned] == [
        "skipped files that cannot be read as images: 3 .txt",
        "folders without images of their own are not classes: 5",
    ]


def test_links_back_to_a_parent_add_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "1.png")
    Image.new("L", (8, 8)).save(tmp_path / "not among them.png")
    data = tmp_path / "data"
    for link, target in (
        ("a/up", "."),
        ("a/b", ".."),
        ("a/over", "../.."),
        ("b/a", "../a"),
        ("b/itself", "itself"),
        ("again", "b"),
    ):
        (data / link).symlink_to(target)
    rows = [(place, label) for place, _, label in read_images(str(data))]
    assert rows == [(str(data / "a/1.png"), 0), (str(data / "b/1.png"), 1)]


def test_links_to_elsewhere_end(tmp_path):
    for name in ("data/a", *(f"elsewhere/{i}" for i in range(12))):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
    for i in range(12):  # each leads to all others, in more orders than can be walked
        for j in range(12):
            (tmp_path / "elsewhere" / str(i) / f"to {j}").symlink_to(tmp_path / "elsewhere" / str(j))
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere/0")
    assert load_images(str(tmp_path / "data"), 1, 8).labels.tolist() == [0] + [1] * 12


def test_where_there_are_sounds_instead_it_says_so(tmp_path):
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"no images in .*, but sounds: use --preset digits-mel"):
        load_images(str(tmp_path), 3, 8)


def test_jpegs_are_read(tmp_path):
    for name in ("a.jpg", "b.JPEG"):
        Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / name, "jpeg", quality=95)
    colours = load_images(str(tmp_path), 3, 8).images.float().mean(dim=(0, 2, 3))
    torch.testing.assert_close(colours, torch.tensor([200.0, 100.0, 50.0]), atol=3, rtol=0)


def test_grey_and_colour_are_brought_to_the_networks_channels(tmp_path):
    grey = pixels(0, 8, 8)
    (tmp_path / "a.png").write_bytes(encoded(grey))
    assert torch.equal(load_images(str(tmp_path), 1, 8).images[0, 0], torch.from_numpy(grey))
    assert torch.equal(load_images(str(tmp_path), 3, 8).images[0], torch.from_numpy(grey).expand(3, -1, -1))
    colour = Image.fromarray(pixels(1, 8, 8, 3))
    colour.save(tmp_path / "a.png")
    assert torch.equal(load_images(str(tmp_path), 1, 8).images[0, 0], torch.from_numpy(np.array(colour.convert("L"))))


@pytest.mark.parametrize("side,size,before", [(28, 32, 2), (5, 8, 1), (7, 8, 0)])
def test_small_images_get_a_black_frame(side, size, before, tmp_path):
    array = pixels(0, side, side)
    (tmp_path / "a.png").write_bytes(encoded(array))
    image = load_images(str(tmp_path), 1, size).images[0, 0]
    inside = slice(before, before + side)
    assert torch.equal(image[inside, inside], torch.from_numpy(array))
    image[inside, inside] = 0
    assert image.shape == (size, size) and not image.any()


@pytest.mark.parametrize("wide", [True, False])
def test_large_images_are_cropped_to_the_middle_and_resized(wide, tmp_path):
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, :20, 0] = array[:, 20:40, 1] = array[:, 40:, 2] = 255
    array = array if wide else array.transpose(1, 0, 2)
    (tmp_path / "a.png").write_bytes(encoded(array))
    expected = torch.tensor([0.0, 255.0, 0.0])[:, None, None].expand(3, 8, 8)
    # At its edges the filter still sees a little of what was cropped.
    torch.testing.assert_close(load_images(str(tmp_path), 3, 8).images[0].float(), expected, atol=20, rtol=0)


def test_resizing_averages_and_keeps_the_orientation(tmp_path):
    y, x = np.mgrid[:32, :32]
    array = (2 * x + 5 * y).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(array))
    means = torch.from_numpy(array.reshape(8, 4, 8, 4).mean(axis=(1, 3)))
    torch.testing.assert_close(load_images(str(tmp_path), 1, 8).images[0, 0].double(), means, atol=4, rtol=0)


@pytest.mark.parametrize("image_column,label_column", [("image", "label"), ("img", "fine_label")])
def test_parquet_in_the_layout_of_the_hub(image_column, label_column, tmp_path):
    arrays = [pixels(i, 8, 8, 3) for i in range(5)]
    write_parquet(tmp_path / "a.parquet", arrays, **{label_column: [4, 0, 2, 2, 1]})
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.rename_columns([image_column, label_column]), tmp_path / "a.parquet", row_group_size=2)
    data = load_images(str(tmp_path / "a.parquet"), 3, 8)
    assert torch.equal(data.images, as_tensor(arrays))
    assert data.labels.tolist() == [4, 0, 2, 2, 1]


def test_parquet_without_labels_has_none(tmp_path):
    write_parquet(tmp_path / "a.parquet", [pixels(0, 8, 8, 3)])
    assert load_images(str(tmp_path / "a.parquet"), 3, 8).labels is None


def write_classes(path, names, labels, column="label") -> None:
    """A Parquet file whose features name its classes, as the Hugging Face Hub's do."""
    write_parquet(path, [pixels(i, 8, 8, 3) for i in range(len(labels))], **{column: labels})
    table = pq.read_table(path)
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    text = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), path)


@pytest.mark.parametrize("column", ["label", "fine_label"])
def test_the_features_of_a_data_set_name_its_classes(column, tmp_path):
    write_classes(tmp_path / "a.parquet", ["cat", "dog", "horse"], [1, 0], column)
    assert load_images(str(tmp_path), 3, 8).class_names == ("cat", "dog", "horse")
    assert load_images(str(tmp_path), 3, 8, labelled=False).class_names is None


@pytest.mark.parametrize(
    "names, expected",
    [
        (["0", "1", "2"], None),  # numbers are no names
        (["crane", "dog", "crane"], ("crane/0", "dog", "crane/2")),  # as ImageNet has two of
        (["cat", "dog"], None),  # the data has a third class
        ("cat", None),
        ([1, 2, 3], None),
        (None, None),
    ],
    ids=str,
)
def test_names_that_are_none(names, expected, tmp_path):
    write_classes(tmp_path / "a.parquet", names, [0, 1, 2])
    data = load_images(str(tmp_path), 3, 8)
    assert data.labels.tolist() == [0, 1, 2] and data.class_names == expected


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"info": null}', "\xff"], ids=len)
def test_features_of_another_program_name_nothing(text, tmp_path):
    write_parquet(tmp_path / "a.parquet", [pixels(0, 8, 8, 3)], label=[0])
    table = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_images(str(tmp_path), 3, 8).class_names is None


@pytest.mark.parametrize("label", ["cat", 0.5, 1.0, -1, True, datetime.date(2020, 1, 1), [1], {"a": 1}], ids=repr)
def test_labels_are_looked_at_only_where_they_are_wanted(label, tmp_path):
    write_parquet(tmp_path / "a.parquet", [pixels(0, 8, 8, 3)], label=[label])
    data = load_images(str(tmp_path), 3, 8, labelled=False)
    assert data.labels is None and len(data) == 1
    assert native_shape(str(tmp_path)) == (3, 8, 8)
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: class labels must be whole numbers from 0; got "):
        load_images(str(tmp_path), 3, 8)


def test_of_a_folder_of_parquet_files_the_training_part_is_read(tmp_path):
    for i, name in enumerate(["test-0", "train-1-of-2", "train-0-of-2"]):
        write_parquet(tmp_path / f"{name}.parquet", [np.full((8, 8, 3), i, np.uint8)], label=[i])
    assert load_images(str(tmp_path), 3, 8).labels.tolist() == [2, 1]
    assert load_images(str(tmp_path / "train-*.parquet"), 3, 8).labels.tolist() == [2, 1]
    assert load_images(str(tmp_path / "*.parquet"), 3, 8).labels.tolist() == [0, 2, 1]
    assert load_images(str(tmp_path / "test-0.parquet"), 3, 8).labels.tolist() == [0]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_idx_as_mnist_is_distributed(zipped, labelled, tmp_path):
    images, labels = pixels(0, 4, 28, 28), np.array([3, 1, 9, 1], np.uint8)
    write = (
        (lambda p, b: p.with_name(p.name + ".gz").write_bytes(gzip.compress(b))) if zipped else lambda p, b: p.write_bytes(b)
    )
    write(tmp_path / "train-images-idx3-ubyte", idx(images))
    write(tmp_path / "t10k-images-idx3-ubyte", idx(images[:1]))
    if labelled:
        write(tmp_path / "train-labels-idx1-ubyte", idx(labels))
    for spec in (tmp_path, tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)):
        data = load_images(str(spec), 1, 28)
        assert torch.equal(data.images[:, 0], torch.from_numpy(images))
        assert (data.labels.tolist() == [3, 1, 9, 1]) if labelled else data.labels is None


@pytest.mark.parametrize(
    "inside", ["data/train-0.parquet", "plain_text/train-0.parquet", "default/train/0.parquet", "data/0.parquet"]
)
def test_a_data_set_of_the_hub_downloaded_into_a_folder(inside, tmp_path):
    (tmp_path / inside).parent.mkdir(parents=True)
    write_parquet(tmp_path / inside, [pixels(0, 8, 8, 3)], label=[3])
    (tmp_path / inside).with_name("._train-0.parquet").write_bytes(b"a Mac's notes")
    if "train" in inside:
        (tmp_path / "data/test").mkdir(parents=True)
        write_parquet(tmp_path / "data/test/test-0.parquet", [pixels(1, 8, 8, 3)], label=[4])
    (tmp_path / "logo.png").write_bytes(encoded(pixels(2, 8, 8)))
    assert load_images(str(tmp_path), 3, 8).labels.tolist() == [3]


def test_of_several_data_sets_in_a_folder_one_is_to_be_named(tmp_path):
    for name in ("grey", "coloured"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "train-0.parquet", [pixels(0, 8, 8, 3)])
    with pytest.raises(ValueError, match=r"holds several data sets; name one of them: .*coloured, .*grey"):
        load_images(str(tmp_path), 3, 8)


@pytest.mark.parametrize("images_dot,images_gz", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("labels_dot,labels_gz", [(False, False), (True, False), (False, True), (True, True)])
def test_labels_are_found_however_they_were_downloaded(images_dot, images_gz, labels_dot, labels_gz, tmp_path):
    paths = []
    for what, rank, dot, gz, array in (
        ("images", 3, images_dot, images_gz, pixels(0, 3, 8, 8)),
        ("labels", 1, labels_dot, labels_gz, np.array([3, 1, 9], np.uint8)),
    ):
        paths.append(tmp_path / f"train-{what}{'.' if dot else '-'}idx{rank}-ubyte{'.gz' if gz else ''}")
        paths[-1].write_bytes(gzip.compress(idx(array)) if gz else idx(array))
    (tmp_path / "train-images-idx3-ubyte-folder").mkdir()  # as archives of MNIST have them
    for spec in (tmp_path, paths[0]):
        assert load_images(str(spec), 1, 8).labels.tolist() == [3, 1, 9]


def test_labels_packed_as_the_images_are_come_first(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels(0, 1, 8, 8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([5], np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"half a download")
    assert load_images(str(tmp_path), 1, 8).labels.tolist() == [5]


def test_images_of_different_sizes_are_both_named_where_one_would_be_padded(tmp_path):
    for name, size in (("a.png", (8, 8)), ("b.png", (8, 8)), ("c.png", (12, 6))):
        Image.new("L", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"or 8 pixels each way at least; .*a\.png is 8x8 and .*c\.png is 12x6"):
        load_images(str(tmp_path), 1, 8)


def test_photos_of_different_sizes_are_cropped_and_resized(tmp_path):
    for name, size in (("a.png", (8, 8)), ("b.png", (30, 20))):
        Image.new("L", size, 200).save(tmp_path / name)
    assert load_images(str(tmp_path), 1, 8).images.eq(200).all()
    with pytest.raises(ValueError, match=r"must all have one size; .*a\.png is 8x8 and .*b\.png is 30x20"):
        load_images(str(tmp_path), 1, 8, equal=True)


def test_hidden_files_are_no_images_and_linked_folders_are_classes(tmp_path):
    for place in ("elsewhere", "data/a", "data/.checkpoints"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place / "0.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    assert load_images(str(tmp_path / "data"), 1, 8).labels.tolist() == [0, 1]


def test_a_photo_is_turned_as_it_says_it_is(tmp_path):
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(np.asarray(picture)[::-1, ::-1].copy())
    assert torch.equal(load_images(str(tmp_path), 1, 8).images[0, 0], expected)


def test_sixteen_bits_a_pixel_are_brought_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert torch.equal(load_images(str(tmp_path), 1, 8).images[0, 0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_the_channels_of_a_data_set_are_those_of_all_its_images(tmp_path):
    for name, mode in (("a.png", "L"), ("b.png", "RGB")):
        Image.new(mode, (8, 8)).save(tmp_path / name)
    assert native_shape(str(tmp_path)) == (3, 8, 8)
    (tmp_path / "b.png").unlink()
    Image.new("LA", (8, 8)).save(tmp_path / "c.png")
    assert native_shape(str(tmp_path)) == (1, 8, 8)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no images in '{tmp_path}'"):
        load_images(str(tmp_path), 3, 8)


@pytest.mark.parametrize("damage", [lambda b: b[:60], lambda b: b"", lambda b: b"not an image", lambda b: b[:40] + bytes(40)])
def test_a_damaged_image_is_named(damage, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0, 8, 8, 3)))
    (tmp_path / "b.png").write_bytes(damage(encoded(pixels(1, 8, 8, 3))))
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        load_images(str(tmp_path), 3, 8)


def test_an_image_that_claims_to_be_gigantic_is_named(tmp_path):
    header = bytearray(encoded(pixels(0, 8, 8, 3), "bmp"))
    header[18:26] = struct.pack("<II", 100_000, 100_000)
    (tmp_path / "a.bmp").write_bytes(header)
    with pytest.raises(
        ValueError, match=r"a\.bmp: not a readable image .*; copy or download it again, or save it smaller, as PNG$"
    ):
        load_images(str(tmp_path), 3, 8)


GOOD_IDX = idx(pixels(0, 3, 8, 8))


@pytest.mark.parametrize(
    "content",
    [
        GOOD_IDX[:-1],
        GOOD_IDX + b"\0",
        GOOD_IDX[:10],
        GOOD_IDX[:2],
        b"",
        b"\0\0\x0d" + GOOD_IDX[3:],
        idx(pixels(0, 3)),
        idx(pixels(0, 2, 2, 8, 8)),
        gzip.compress(GOOD_IDX),
    ],
    ids=["cut off", "too long", "half a header", "two bytes", "empty", "floats", "labels", "four dimensions", "zipped"],
)
def test_a_damaged_idx_file_is_named(content, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: not a whole IDX file .*; copy or download it again$"):
        load_images(str(tmp_path), 1, 8)


def test_a_damaged_gzip_file_is_named(tmp_path):
    zipped = gzip.compress(GOOD_IDX)
    block_type = bytearray(zipped)
    block_type[10] = 0xFF
    checksum = bytearray(zipped)
    checksum[-5] ^= 1
    for content in (zipped[:-20], block_type, checksum, GOOD_IDX):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"train-images-idx3-ubyte\.gz: not a whole IDX file .*; copy or download it again$"
        ):
            load_images(str(tmp_path), 1, 8)


def test_a_gzip_file_that_would_fill_the_memory_is_named(tmp_path):
    size = 2**28 + 1
    header = struct.pack(">HBB3I", 0, 8, 3, 1, 1, size)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(2**16)))
    with pytest.raises(ValueError, match=rf"idx3-ubyte\.gz: .* would become {size}: a decompression bomb"):
        load_images(str(tmp_path), 1, 8)


@pytest.mark.parametrize("job", ["sampling", "restoration", "interpolation", "edit", "errors", "record"])
def test_what_a_command_makes_of_all_its_images_is_not_among_them(job, tmp_path):
    made = {"sampling": ["grid.png"], "interpolation": ["grid.png", "film.gif"]}.get(job, ["comparison.png"])
    for name in ("1.png", *made):
        Image.new("L", (8, 8)).save(tmp_path / name)
    assert len(load_images(str(tmp_path), 1, 8)) == 1 + len(made)
    (tmp_path / f"{job}.json").write_text("{}")
    assert len(load_images(str(tmp_path), 1, 8)) == 1


def test_labels_that_do_not_fit_the_images_are_named(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(GOOD_IDX)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(pixels(0, 2)))
    with pytest.raises(ValueError, match=r"images-idx3-ubyte has 3 images but .*labels-idx1-ubyte has 2 labels"):
        load_images(str(tmp_path), 1, 8)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="labels-idx1-ubyte: not a whole IDX file"):
        load_images(str(tmp_path), 1, 8)
    assert len(load_images(str(tmp_path), 1, 8, labelled=False)) == 3


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [pixels(i, 8, 8, 3) for i in range(4)])
    whole = path.read_bytes()
    broken_page = bytearray(whole)
    broken_page[4:24] = b"\xff" * 20
    for content in (whole[: len(whole) // 2], whole[:-1], b"", b"garbage" * 10, broken_page):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file .*; copy or download it again$"):
            load_images(str(path), 3, 8)


@pytest.mark.parametrize(
    "columns,message",
    [
        ({"picture": [1]}, r"no column 'image' \(there are 'picture'\)"),
        ({"image": [{"bytes": b"no image", "path": None}]}, "row 0: not a readable image"),
        ({"image": [{"bytes": None, "path": "a.png"}]}, "row 0: its column has no encoded image"),
        ({"image": [None]}, "row 0: its column has no encoded image"),
        ({"image": [7]}, "row 0: its column has no encoded image"),
        (
            {"image": [{"bytes": encoded(pixels(0, 8, 8))}], "label": ["cat"]},
            "row 0: class labels must be whole numbers from 0; got 'cat'",
        ),
    ],
)
def test_parquet_in_another_layout_is_named(columns, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet[:,] " + message):
        load_images(str(tmp_path / "a.parquet"), 1, 8)


@pytest.mark.parametrize("name", ["x.npy", "stats.pkl", "notes.txt", "picture"])
def test_a_file_of_another_kind_is_named_with_the_kinds_that_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: unknown kind of file; give .*\.png.*Parquet.*IDX"):
        load_images(str(tmp_path / name), 3, 8)


def test_a_pattern_of_other_files_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0, 8, 8)))
    with pytest.raises(ValueError, match=r"\*\.png': a pattern is for Parquet or tar files, and it matches .*a\.png"):
        load_images(str(tmp_path / "*.png"), 3, 8)


@pytest.mark.parametrize("spec", ["nothing", "./photos/here", "/no/such/folder", "a/b/c", "*.parquet"])
def test_a_missing_path_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no images at {re.escape(repr(spec))}"):
        load_images(spec, 3, 8)


def test_a_hub_name_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no folder 'owner/name' here.*pip install 'ddim_fast\[train\]'"):
        load_images("owner/name", 3, 8)


def test_images_of_the_hub_are_decoded_as_all_others_are(tmp_path, monkeypatch):
    (tmp_path / "1.png").write_bytes(encoded(pixels(0, 8, 8)))
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(clear, "PNG")
    rows = [
        {"image": {"bytes": clear.getvalue(), "path": None}, "label": 1},
        {"image": {"bytes": None, "path": str(tmp_path / "1.png")}, "label": 0},
        {"image": {"bytes": b"no image", "path": None}, "label": 0},
    ]

    class Rows(list):
        column_names = ("image", "label")
        features = dict.fromkeys(column_names, SimpleNamespace(names=["cat", "dog"]))
        cache_files = ()

        def cast_column(self, name, feature):
            assert name == "image" and feature == "undecoded"
            return self

    hub = SimpleNamespace(
        load_dataset=lambda name, split: Rows(rows), Image=lambda decode: "decoded" if decode else "undecoded"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(ValueError, match="owner/name, row 2: not a readable image"):
        load_images("owner/name", 1, 8)
    del rows[2]
    data = load_images("owner/name", 1, 8)
    assert data.images[0].eq(255).all() and data.labels.tolist() == [1, 0] and data.class_names == ("cat", "dog")
    assert torch.equal(data.images[1, 0], torch.from_numpy(pixels(0, 8, 8)))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [pixels(0, 8, 8, 3)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow: pip install 'ddim_fast\[train\]'"):
        load_images(str(tmp_path), 3, 8)


def test_bytes_become_minus_one_to_one():
    values = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1))
    torch.testing.assert_close(values.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    images = to_unit_range(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_a_set_moves_with_its_labels():
    data = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])).to(torch.device("meta"))
    assert data.images.device.type == data.labels.device.type == "meta"
