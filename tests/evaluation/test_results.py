import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from PIL import Image

from ddim_fast.evaluation.results import Results, fid_label, machine

RUN = {"command": "python -m ddim_fast.evaluate", "machine": "a machine", "ddim_fast": "0", "torch": "0"}


def quality(steps, fid, **settings):
    base = {"model": "m", "solver": "ddim", "spacing": "linear", "eta": 0.0, "steps": steps, "reference": "r", "seeds": "0-9"}
    found = {"images": 10, "reference images": "20 images", "label": "FID-10", "FID-10": fid, "evaluations": float(steps)}
    return "quality", {**base, **settings}, found, RUN


@pytest.mark.parametrize(
    "images,label",
    [(50_000, "FID"), (60_000, "FID"), (49_999, "FID-49999"), (10_000, "FID-10k"), (2_000, "FID-2k"), (512, "FID-512")],
)
def test_fewer_than_50000_images_are_in_the_name(images, label):
    assert fid_label(images) == label


def test_rows_are_kept_and_found_again(tmp_path):
    results = Results(tmp_path / "out")
    assert results.rows == [] and not (tmp_path / "out").exists()
    for steps, fid in ((20, 3.0), (5, 9.0)):
        results.add(*quality(steps, fid))
    again = Results(tmp_path / "out")
    assert again.rows == results.rows
    assert again.find("quality", quality(5, 0)[1])["FID-10"] == 9.0
    assert again.find("quality", quality(6, 0)[1]) is None and again.find("loss", quality(5, 0)[1]) is None
    again.add(*quality(5, 8.0, spacing="quadratic")[:3], {**RUN, "machine": "another"})
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["run"] for row in content["rows"]] == [1, 1, 2] and len(content["runs"]) == 2


def test_evaluations_at_the_same_time_keep_each_others_rows(tmp_path):
    def evaluate(spacing):
        results = Results(tmp_path / "out")
        barrier.wait()
        for steps in range(1, 6):
            results.add(*quality(steps, 1.0, spacing=spacing)[:3], {**RUN, "command": spacing})

    barrier = Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(evaluate, map(str, range(8))))
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(content["rows"]) == 40 and len(content["runs"]) == 8
    assert all(content["runs"][row["run"] - 1]["command"] == row["settings"]["spacing"] for row in content["rows"])


def test_the_report_has_a_table_and_a_picture_a_kind(tmp_path):
    pytest.importorskip("matplotlib")
    results = Results(tmp_path)
    for steps, fid in ((20, 3.25), (5, 9.0)):
        results.add(*quality(steps, fid, guidance=2.0))
    results.add(*quality(50, 2.0, guidance=1.5, guidance_interval=[100, 700]))
    loss = {"images": 3, "loss": 0.03, "loss standard error": 0.001, "loss by timestep": {"0-9": 0.5, "10-99": None}}
    results.add("loss", {"model": "m", "data": "d"}, loss, RUN)
    files = results.report()
    assert [f.name for f in files] == ["evaluation.md", "quality.png"] and Image.open(files[1]).size[0] > 400
    lines = files[0].read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "FID-10" in table[0] and "FID |" not in table[0]
    assert [row.split(" | ")[4:6] for row in table[2:5]] == [["5", "2"], ["20", "2"], ["50", "1.5 in 100-700"]]
    assert "9.00" in table[2] and "0.0300 ± 0.0010 | 0-9: 0.5 |" in table[7]
    assert "1. a machine; ddim_fast 0, torch 0: `python -m ddim_fast.evaluate`" in lines


def test_what_changed_under_its_name_is_told_apart(tmp_path):
    """Another reference, other weights, another feature network: never in one table or line with what had the name before."""
    pytest.importorskip("matplotlib")
    results = Results(tmp_path)
    results.add(*quality(5, 9.0))  # of an older version, which wrote no checksums
    for steps, options in enumerate(({}, {"weights": "sha256:b"}, {"reference content": "ccc"}, {"features": "mine sha256:0"})):
        results.add(*quality(steps + 1, 1.0, **{"weights": "sha256:a", "reference content": "bbb", **options}))
    lines = results.markdown().splitlines()
    assert [line for line in lines if line.startswith("###")] == [
        "### FID-10 against r (20 images)",
        "### FID-10 against r (20 images) (bbb)",
        "### FID-10 against r (20 images) (ccc)",
        "### FID-10 against r (20 images), features of mine sha256:0",
    ]
    networks = [line.split(" | ")[0] for line in lines if line.startswith("| m")]
    assert networks == ["| m", "| m (a)", "| m (b)", "| m (a)", "| m (a)"]
    assert len(results.report()) == 5
    for row in results.rows:
        assert "network" not in row  # which is of the report alone


@pytest.mark.parametrize("content", ['{"rows": 3}', '{"runs": [], "rows": [3]}', '{"runs": [], "rows": [{"kind": "odd"}]}'])
def test_a_file_of_something_else_is_named(content, tmp_path):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json: not the results of an evaluation; restore the file from a copy"):
        Results(tmp_path)


@pytest.mark.parametrize(
    ("row", "runs"),
    [
        ({"kind": "loss", "settings": {"data": "d"}, "loss": 0.5}, []),  # neither model nor images
        ({"kind": "loss", "settings": {"data": "d", "model": "m"}, "loss": "x"}, []),
        ({"kind": "quality", "settings": {"reference": "r", "model": "m"}}, []),
        ({"kind": "loss", "settings": {"data": "d", "model": "m"}, "loss": 0.5}, [{"machine": "cpu"}]),
    ],
)
def test_a_damaged_row_is_one_line_that_names_the_file(row, runs, tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"runs": runs, "rows": [row]}))
    with pytest.raises(ValueError, match=r"^\S*evaluation\.json: a row or run in it is damaged \(.*\); restore .*--out$"):
        Results(tmp_path)


def test_the_machine_says_what_it_is():
    assert f"{torch.get_num_threads()} threads" in machine(torch.device("cpu"))
