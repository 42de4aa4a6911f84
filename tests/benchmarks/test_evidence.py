"""The figures of the pages in PAGES are those of the files in benchmarks/results.

Each table has a function here that makes its rows from the results, or a place in NOT_MEASURED or WITHOUT_DATA. Cells without
data are None there. Where a page and a result differ, correct the page.
"""

import functools
import itertools
import json
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from report import table

from ddim_fast import NoiseSchedule, UNet, UNetConfig, sample, select_timesteps, train
from ddim_fast.evaluation.results import Results
from ddim_fast.models.config import preset_names
from ddim_fast.ops.attention import FASTER_IN_TRITON
from ddim_fast.training.options import TrainingOptions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEDULE = NoiseSchedule.linear(1e-4, 0.02, 1000)
MODELS = ROOT / "ddim_fast" / "models" / "packaged"
PAGES = (
    "README.md",
    *sorted(page.relative_to(ROOT).as_posix() for folder in (ROOT / "docs", RESULTS) for page in folder.glob("*.md")),
    *(f"benchmarks/results/h100/{name}.md" for name in ("networks", "operators")),
    *(f"benchmarks/results/zen4-two-cores/{name}.md" for name in ("networks", "operators")),
)

# Tables of words, of predictions and of other people's figures.
NOT_MEASURED = {
    "README: What else it does, 1",
    "evaluation: What to measure, 1",
    "diffusers: Choose a part, 1",
    "diffusers: The scheduler, 1",
    "diffusers: The network, 1",
    "engines: Choose an engine, 1",
    "engines: Choose a dtype, 1",
    "captured: What it takes, 1",
    "getting-started: Install, 1",
    "engines: Reproducibility, 1",
    "kernels: Choose an implementation, 1",
    "kernels: Choose an implementation, 2",
    "kernels: What waits for a GPU, 1",
    "onnx: Choose a precision, 1",
    "onnx: The folder, 1",
    "quality: Published values, 1",
    "data: Training data, 1",
    "architecture: Architecture, 1",
    "architecture: Rooms, 1",
    "audio: How a sound is an image, 1",
    "audio: Options, 1",
    "editing: Which edit, 1",
    "latent: Which autoencoder, 1",
    "restoration: Options, 1",
}

# Measured, wholly or in part, but not committed: the page says so beside the table.
WITHOUT_DATA = {
    "h100/operators: Machine code, 1": "what compilers print; tests/kernels and tests/csrc check the limits",
    "training-recipes: The two recipes, 1": "models of some minutes, which were not kept",
    "training-recipes: Prediction type and min-SNR weights, 1": "models of some minutes, which were not kept",
    "training-recipes: A gamma of 5 leaves grain: fashion-mnist, 1": "the first stage's loss by timestep",
    "training-recipes: Muon beside Adam, 1": "networks of 200 steps, which were not kept",
    "training-recipes: Muon beside Adam, 2": "networks of 200 steps, which were not kept",
    "training-recipes: Length of the weights' average, 1": "models of some minutes, which were not kept",
    "trajectory-error: Which distance FID follows, 1": "distances of the calibration, and FID of other lists",
    "guidance-by-class: Swapped classes, 1": "to be measured again by benchmarks/classified.py --swap",
    "guidance-by-class: Classifier guidance, 1": "to be measured again by benchmarks/classified.py --gradients",
    "guidance-by-class: Classifier-free guidance, 1": "to be measured again by benchmarks/classified.py",
    "restoration-psnr: Time travel by task, 1": "to be measured again by ddim_fast.restore --degrade",
}

Rows = list[list[str]]
Expected = list[list[str | None]]
EXPECTED: dict[str, Callable[[Rows], Expected]] = {}


class Table(NamedTuple):
    """Its rows, the header first, and the paragraphs before and after it."""

    rows: Rows
    around: str


def read_tables(page: str) -> dict[str, Table]:
    """The tables of a page, without asterisks, each called by the page, its heading and its number under that."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = re.split(r"\n{2,}", text.replace("**", ""))
    name = re.sub(r"^(docs|benchmarks/results)/", "", page).removesuffix(".md")
    found: dict[str, Table] = {}
    heading, count = "", 0
    for i, block in enumerate(blocks):
        if block.startswith("#"):
            heading, count = block.splitlines()[0].lstrip("# "), 0
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            count += 1
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            around = "\n".join(blocks[max(i - 1, 0) : i + 2])
            found[f"{name}: {heading}, {count}"] = Table([rows[0], *rows[2:]], " ".join(around.split()))
    return found


TABLES = {name: table for page in PAGES for name, table in read_tables(page).items()}


def makes(name: str) -> Callable[[Callable[[Rows], Expected]], Callable[[Rows], Expected]]:
    """Marks what makes the rows below the header, given all rows as they are printed: their labels say what is wanted."""

    def register(function: Callable[[Rows], Expected]) -> Callable[[Rows], Expected]:
        EXPECTED[name] = function
        return function

    return register


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# Results of benchmarks


@functools.cache
def result(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())


def timed(file: str, group: str) -> dict[str, Any]:
    """What a benchmark noted."""
    benchmarks = {benchmark["group"]: benchmark for benchmark in result(f"zen4-two-cores/{file}.json")["benchmarks"]}
    return benchmarks[group]["extra_info"]


def unet(file: str, group: str) -> dict[str, float]:
    """Evaluations a second by implementation."""
    return timed(file, group)["evaluations/s"]


def h100(file: str, group: str) -> dict[str, dict[str, float]]:
    """The figures by implementation."""
    found = {}
    for benchmark in result(f"h100/{file}.json")["benchmarks"]:
        if benchmark["group"] == group:
            parameters = benchmark["params"]
            found[parameters.get("implementation") or parameters.get("backend") or "compiled"] = benchmark["extra_info"]
    return found


def h100_times(file: str, group: str) -> dict[str, float]:
    """Microseconds by implementation."""
    return {name: figures["microseconds"] for name, figures in h100(file, group).items()}


def against_diffusers(headers: list[str], rates: dict[str, float]) -> list[str]:
    """A cell for each implementation: its rate as a multiple of diffusers' in float32."""
    in_file = {
        "ONNX Runtime": "onnxruntime",
        "OpenVINO": "openvino",
        "diffusers compiled": "diffusers-compiled",
        "ours compiled": "compiled",
        "ours captured": "captured",
        "ours": "eager",
    }
    cells = []
    for header in headers:
        implementation, precision = header.rsplit(" ", 1)
        rate = rates.get(f"{in_file.get(implementation, implementation)} {precision}")
        cells.append("-" if rate is None else f"{rate / rates['diffusers fp32']:.2f}" if header != "diffusers fp32" else "1")
    return cells


@makes("README: How fast, 1")
def _(rows: Rows) -> Expected:
    files = {"AVX-512 (BF16, VNNI)": "unet-avx512", "AVX2": "unet-avx2"}
    return [[row[0], *against_diffusers(rows[0][1:], unet(files[row[0]], "cifar10-128 batch 8"))] for row in rows[1:]]


@makes("engines: Speed on a CPU, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, *_ in rows[1:]:
        network, batch, instructions = label.split(", ")
        file = {"AVX-512": "unet-avx512", "AVX2": "unet-avx2"}[instructions]
        expected.append([label, *against_diffusers(rows[0][1:], unet(file, f"{network} batch {batch}"))])
    return expected


@makes("zen4-two-cores/networks: One evaluation, AVX-512, 1")
def unets(rows: Rows, file: str = "unet-avx512") -> Expected:
    return [[row[0], *against_diffusers(rows[0][1:], unet(file, row[0].replace(",", " batch")))] for row in rows[1:]]


@makes("zen4-two-cores/networks: Sampling runs, AVX-512, 1")
def sampling_runs(rows: Rows, file: str = "sampler-avx512") -> Expected:
    groups = {row[0]: "{} batch {} steps {}".format(*row[0].split(", ")) for row in rows[1:]}
    return [[label, *against_diffusers(rows[0][1:], unet(file, group))] for label, group in groups.items()]


@makes("zen4-two-cores/networks: Sampling runs, AVX2, 1")
def _(rows: Rows) -> Expected:
    return sampling_runs(rows, "sampler-avx2")


@makes("captured: Figures, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for row in rows[1:]:
        network, batch, instructions = row[0].split(", ")
        file = {"AVX-512": "sampler-avx512", "AVX2": "sampler-avx2"}[instructions]
        expected.append([row[0], *against_diffusers(rows[0][1:], unet(file, f"{network} batch {batch} steps 10"))])
    return expected


@makes("engines: Choose a dtype, 2")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    names = [header.replace(",", "") for header in rows[0][1:]]
    for solver in ("ddim", "dpm-solver++"):
        noted = timed("approximations-avx512", f"{solver}, 32 images")
        rates = noted["evaluations/s"]
        expected.append([f"`{solver}`: error", *(f"{noted['error'][name]:.3f}" for name in names)])
        expected.append(["speed", "1", *(f"{rates[name] / rates[names[0]]:.2f}" for name in names[1:])])
    return expected


@makes("onnx: Speed, 1")
def _(rows: Rows) -> Expected:
    small, large = (timed("onnx-avx512", group) for group in ("1x32x32 batch 8 steps 20", "3x32x32 batch 8 steps 4"))
    first, *names = [h.split(", ")[-1].replace("ours", "ddim_fast") for h in rows[0][1:]]

    def ratios(noted: dict[str, Any]) -> list[str]:
        rates = noted["evaluations/s"]
        return ["1", *(f"{rates[name] / rates[first]:.2f}" for name in names)]

    errors = [f"{small['relative error'][name]:.1e}".replace("0.0e+00", "0") for name in (first, *names)]
    return [[row[0], *cells] for row, cells in zip(rows[1:], (ratios(small), errors, ratios(large)), strict=True)]


@makes("diffusers: Speed, 1")
def _(rows: Rows) -> Expected:
    groups = ("DDIMPipeline cifar10 batch 1", "DDIMPipeline cifar10 batch 8", "UNet2DConditionModel 32x32 batch 2")
    expected: Expected = []
    for row, group in zip(rows[1:], groups, strict=True):
        rates = unet("diffusers-accelerated", group)
        expected.append([row[0], "1", *(f"{rates[name] / rates['plain fp32']:.2f}" for name in rows[0][2:])])
    return expected


@makes("zen4-two-cores/networks: One evaluation, AVX2, 1")
def _(rows: Rows) -> Expected:
    return unets(rows, "unet-avx2")


def networks_on_h100() -> dict[tuple[int, str], tuple[float, float]]:
    """Milliseconds and error of the 35.7M network by batch and implementation."""
    pattern = r"cifar10-128 batch (\d+) (\w+) bf16 eager in a graph: ([\d.]+) ms, error ([\d.]+)"
    lines = re.findall(pattern, (RESULTS / "h100" / "network.txt").read_text())
    return {(int(batch), name): (float(ms), float(error)) for batch, name, ms, error in lines}


@makes("h100/networks: One evaluation, 1")
def _(rows: Rows) -> Expected:
    found = networks_on_h100()
    expected = []
    for batch in (64, 512):
        (theirs, their_error), (ours, our_error) = found[batch, "diffusers"], found[batch, "ours"]
        errors = f"{100 * our_error:.1f} % ({100 * their_error:.1f} %)"
        expected.append([str(batch), f"{theirs:#.3g} ms", f"{ours:#.3g} ms", f"{theirs / ours:.1f} x", errors])
    return expected


@makes("h100/operators: Predicted and measured, 1")
def _(rows: Rows) -> Expected:
    step = {batch: h100_times("ddim_step", f"ddim_step batch {batch}")["triton"] for batch in (512, 16384)}
    everything = h100_times("ddim_step", "everything batch 512")["triton"]
    norm = h100_times("group_norm_silu-corrected", "group_norm_silu bf16 channels_last 512x128x32x32")["triton"]
    backward = min(us for line, us in tiles("tiles-2").items() if line.startswith("norm backward 512 128+0 32"))
    attention = h100_times("attention", "attention torch.bfloat16 (512, 1, 256, 256)")
    measured = [
        f"{step[512]:.1f} us (from the L2 cache, when repeated)",
        f"{step[16384]:.0f} us",
        f"{everything:.1f} us",
        f"{norm:.0f} us",
        "not yet measured",
        f"{backward:.0f} us",
        "not yet measured",
        f"{attention['triton']:.0f} us; PyTorch's, which serves, {attention['pytorch']:.0f} us",
    ]
    return [[*row[:-1], cell] for row, cell in zip(rows[1:], measured, strict=True)]


@makes("h100/operators: group_norm_silu, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, *_ in rows[1:]:
        _, channels, height, _, groups = numbers(label)
        group = f"group_norm_silu bf16 channels_last 512x{channels}x{height}x{groups}"
        now, before = h100("group_norm_silu-corrected", group), h100_times("group_norm_silu", group)
        compiled, triton = now["compiled"]["microseconds"], now["triton"]["microseconds"]
        share = now["triton"]["GB/s"] / 2950
        earlier = [f"{before['compiled'] / before[name]:.2f} x" for name in ("triton", "pytorch", "cuda")]
        expected.append([label, f"{compiled:.1f} us", f"{compiled / triton:.2f} x", f"{100 * share:.0f} %", *earlier])
    return expected


def tiles(file: str) -> dict[str, float]:
    """Microseconds by the line's beginning, without the lines of what failed."""
    lines = re.findall(r"^(.+): ([\d.]+)$", (RESULTS / "h100" / f"{file}.txt").read_text(), re.MULTILINE)
    return {line: float(us) for line, us in lines}


@makes("h100/operators: attention, 1")
def _(rows: Rows) -> Expected:
    return [[label, attention_cell(*numbers(label))] for label, *_ in rows[1:]]


def test_attention_is_ours_where_the_results_say_so():
    for tokens, dim in itertools.product((16, 64, 256), (128, 256)):
        chosen = any((torch.bfloat16, tokens, dim) == row[:3] for row in FASTER_IN_TRITON)
        assert chosen == ("PyTorch's serves" not in attention_cell(tokens, dim))
    assert len(FASTER_IN_TRITON) == 4


def attention_cell(tokens: int, dim: int) -> str:
    """For 1, 8 and 64 images by the tiles of then, for 512 by the best ones, or by the later benchmark of them."""
    times = tiles("tiles-2")
    ratios = [times[f"sdpa {n} {tokens} {dim}"] / times[f"ours {n} {tokens} {dim}"] for n in (1, 8, 64)]
    last = h100_times("attention", f"attention torch.bfloat16 (512, 1, {tokens}, {dim})") or {
        "pytorch": times[f"sdpa 512 {tokens} {dim}"],
        "triton": min(us for line, us in times.items() if line.startswith(f"ours 512 {tokens} {dim}")),
    }
    ratios.append(last["pytorch"] / last["triton"])
    faster = min(ratios) > 1
    return ", ".join(f"{ratio:.{1 if faster else 2}f}" for ratio in ratios) + ("" if faster else ": PyTorch's serves")


@makes("kernels: Speed on a GPU, 1")
def _(rows: Rows) -> Expected:
    ratios: list[list[float]] = []
    file = "group_norm_silu-corrected"
    groups = {benchmark["group"] for benchmark in result(f"h100/{file}.json")["benchmarks"]}
    ratios.append([times["compiled"] / times["triton"] for times in (h100_times(file, group) for group in groups)])
    for counts in ((16, 64), (256,)):
        cells = [attention_cell(tokens, dim) for tokens in counts for dim in (128, 256)]
        ratios.append([float(cell.split(":")[0].split(", ")[-1]) for cell in cells])
    steps = [h100_times("ddim_step", f"ddim_step batch {batch}") for batch in (512, 16384)]
    ratios.append([times["compiled"] / times["triton"] for times in steps])
    decimals = (2, 1, 2, 2)
    cells = [f"{min(found):.{n}f} to {max(found):.{n}f}" for found, n in zip(ratios, decimals, strict=True)]
    return [[*row[:-1], cell] for row, cell in zip(rows[1:], cells, strict=True)]


INSTRUCTIONS = {"avx512": "AVX-512", "avx2": "AVX2", "avx512_bf16": "AVX-512 BF16"}


def operators(**wanted: Any) -> list[dict[str, Any]]:
    """The rows of every_cpu.py, of all files, with these fields."""
    rows = [row for name in ("avx512", "avx2") for row in result(f"zen4-two-cores/every_cpu-{name}.json")["rows"]]
    return [row for row in rows if all(row[field] == value for field, value in wanted.items())]


@makes("kernels: Speed on a CPU, 1")
def _(rows: Rows) -> Expected:
    def cell(operator: str, header: str) -> str:
        _, instructions = header.split(", ")
        (name,) = (name for name, printed in INSTRUCTIONS.items() if printed == instructions)
        memory_format = "contiguous" if operator == "ddim_step" else "channels_last"
        members = operators(**{"operator": operator, "instruction set": name, "memory format": memory_format})
        ratios = [row["ratio"] for row in members]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    return [[row[0], *(cell(row[0].strip("`"), header) for header in rows[0][1:])] for row in rows[1:]]


@makes("zen4-two-cores/operators: Every shape of the networks, 1")
def _(rows: Rows) -> Expected:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in operators():
        key = (f"`{row['operator']}`", INSTRUCTIONS[row["instruction set"]], row["dtype"], row["memory format"])
        groups.setdefault(key, []).append(row)
    expected: Expected = []
    for key, members in groups.items():
        ratios = [row["ratio"] for row in members]
        numbers = [f"{value:.2f}" for value in (min(ratios), statistics.median(ratios), max(ratios))]
        if key[0] != "`cifar10-64`":
            expected.append([*key, str(len(ratios)), *numbers, "C++" if members[0]["chosen"] else "PyTorch"])
    return expected


@makes("zen4-two-cores/operators: fast_ddim_step, 1")
def _(rows: Rows) -> Expected:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark in result("zen4-two-cores/ddim_step-avx512.json")["benchmarks"]:
        name = benchmark["name"].split("[")[0].removeprefix("test_")
        found[f"{name} {(benchmark['params'] or {}).get('backend', '')}".strip(), benchmark["group"]] = benchmark["extra_info"]
    expected: Expected = []
    for label, *_ in rows[1:]:
        if "noise" in label:
            plain, ours = (
                found[f"fast_ddim_step_guided_clipped_and_stochastic {name}", f"everything batch {numbers(label)[0]}"]
                for name in ("reference", "native")
            )
            ratio = f"{plain['microseconds'] / ours['microseconds']:.2f}"
            expected.append([label, ratio, "-", "-", f"{ours['share of copy']:.0%}"])
            continue
        group = f"ddim_step batch {label}"
        ours = found["fast_ddim_step native", group]
        others = (found[name, group] for name in ("fast_ddim_step reference", "compiled_formula", "diffusers_scheduler"))
        ratios = [f"{other['microseconds'] / ours['microseconds']:.2f}" for other in others]
        expected.append([label, *ratios, f"{ours['share of copy']:.0%}"])
    return expected


@makes("zen4-two-cores/operators: conv3x3, 1")
def _(rows: Rows) -> Expected:
    ratios = {label: [conv3x3_ratio(label, instructions) for instructions in INSTRUCTIONS] for label, *_ in rows[1:]}
    return [[label, *cells, ratio_of_8_bits(label)] for label, cells in ratios.items()]


def ratio_of_8_bits(label: str) -> str:
    """Our time in bfloat16 over that of 8-bit products."""
    channels, out_channels, height, width = numbers(label)[:4]
    enlarged = " enlarged" if "enlarged" in label else ""
    rates = unet("conv3x3-avx512", f"conv3x3 batch 8 {channels} -> {out_channels}, {height}x{width}{enlarged}")
    return f"{rates['ours int8'] / rates['ours bf16']:.2f}"


def conv3x3_ratio(label: str, instructions: str) -> str:
    """PyTorch's time over ours for 8 images, the median of with and without a residual."""
    channels, out_channels, height, width = numbers(label)[:4]
    precision = {"dtype": "bfloat16" if instructions.endswith("bf16") else "float32", "instruction set": instructions}
    ratios = []
    for row in operators(operator="conv3x3", **precision):
        images, weight, _, enlarged = row["shape"]
        same = (images, weight) == ([8, channels, height, width], [out_channels, channels])
        if same and enlarged == ("enlarged" in label):
            ratios.append(row["ratio"])
    return f"{statistics.median(ratios):.2f}"


# Results of evaluations


@functools.cache
def evaluations() -> list[dict[str, Any]]:
    """All rows, with the name of their folder as the model's."""
    files = sorted(RESULTS.glob("*/*/evaluation.json"))
    return [{**row, "model": file.parent.name} for file in files for row in json.loads(file.read_text())["rows"]]


def found(kind: str, model: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with these settings; of the usual ones where they say nothing else."""
    usual = {"tolerance": None, "guidance": None, "guidance_interval": None, "guide": None}
    if "solver" in settings:
        usual["eta"] = 0.0
    if (model, settings.get("seeds")) == ("cifar10-64", "0-511"):  # FID; KID has test images
        usual["reference"] = "fid-train-stats.npz"
    wanted = usual | settings
    rows = [row for row in evaluations() if (row["kind"], row["model"]) == (kind, model)]
    return [row for row in rows if all(row["settings"].get(name) == value for name, value in wanted.items())]


def quality(model: str, seeds: str | None = "0-511", **settings: Any) -> dict[str, Any]:
    """The one row with these settings. Its FID is called that, from however many images it is."""
    (row,) = found("quality", model, {"seeds": seeds, **settings})
    return {**row, "FID": row[row["label"]]}


@functools.cache
def quadratic(steps: int) -> list[int]:
    return select_timesteps(SCHEDULE, steps, "quadratic").tolist()


@functools.cache
def fitted(model: str, solver: str, steps: int) -> list[int]:
    """The packaged model's adaptive timesteps."""
    return json.loads((MODELS / model / "timesteps.json").read_text())["timesteps"][solver][str(steps)]


def of_steps(kind: str, model: str, label: str, steps: int, seeds: str, **more: Any) -> dict[str, Any]:
    """The one row of ``DDIM, quadratic, eta 0.5`` and the like. Adaptive timesteps are those of the packaged model; where they
    are quadratic ones and have no row, that of the quadratic ones."""
    solver, spacing, *eta = label.lower().replace(" spacing", "").split(", ")
    settings: dict[str, Any] = {"solver": solver, "spacing": spacing, "steps": steps, "seeds": seeds, **more}
    if eta:
        name = eta[0].removeprefix("eta ")
        settings["eta"] = name if name == "sigma-hat" else float(name)
    rows = found(kind, model, settings)
    if spacing == "adaptive":
        rows = [row for row in rows if row["settings"]["timesteps"] == fitted(model, solver, steps)]
        if not rows and is_quadratic(model, label, steps):
            return of_steps(kind, model, f"{solver}, quadratic", steps, seeds, **more)
    (row,) = rows
    return row


def is_quadratic(model: str, label: str, steps: int) -> bool:
    """Whether these adaptive timesteps are quadratic ones."""
    return fitted(model, label.lower().split(",")[0], steps) == quadratic(steps)


def by_steps(rows: Rows, cell: Callable[[list[str], int], str | None], model: str = "", labels: int = 1) -> Expected:
    """A row for each label, a cell for each number of steps in the header. ``as quadratic`` is true where it is."""
    expected: Expected = []
    for row in rows[1:]:
        cells = []
        for header, printed in zip(rows[0][labels:], row[labels:], strict=True):
            steps = numbers(header)[-1]
            same = printed == "as quadratic" and is_quadratic(model or named(row[0]), row[0].split(": ")[-1], steps)
            cells.append(printed if same or not printed else cell(row[:labels], steps))
        expected.append([*row[:labels], *cells])
    return expected


def named(label: str) -> str:
    """The model that a label names in backquotes; ``fashion-mnist`` where it names none."""
    return label.split("`")[1] if "`" in label else "fashion-mnist"


def with_error(row: dict[str, Any], name: str, decimals: int, factor: float = 1) -> str:
    return f"{factor * row[name]:.{decimals}f} ± {factor * row[f'{name} standard error']:.{decimals}f}"


def kid(row: dict[str, Any]) -> str:
    return with_error(row, "KID", 1, 1000)


def fid_table(rows: Rows, model: str, decimals: int = 2) -> Expected:
    return by_steps(
        rows, lambda label, steps: f"{of_steps('quality', model, label[0], steps, '0-511')['FID-512']:.{decimals}f}", model
    )


@makes("sampling: Solver and steps, 1")
@makes("cifar10-64: Solvers, spacings and eta, 1")
def _(rows: Rows) -> Expected:
    return fid_table(rows, "cifar10-64")


@makes("quality: fashion-mnist, 1")
@makes("fashion-mnist: Solvers, spacings and eta, 1")
def _(rows: Rows) -> Expected:
    return fid_table(rows, "fashion-mnist")


@makes("README: How good, 2")
@makes("quality: How few steps, 1")
def _(rows: Rows) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        model, label = named(labels[0]), labels[0].split(": ")[-1]
        if label == "consistency":
            return f"{quality(model, solver=label, steps=steps)['FID']:.2f}"
        return f"{of_steps('quality', model, label, steps, '0-511')['FID-512']:.2f}"

    return by_steps(rows, cell)


@makes("quality: How few steps, 2")
def _(rows: Rows) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        model, label = named(labels[0]), labels[0].split(": ")[-1]
        if label == "consistency":
            return kid(quality(model, solver=label, steps=steps))
        more = {"reference": "cifar10-test-2000.npz"} if model == "cifar10-64" else {}
        return kid(of_steps("quality", model, label, steps, "0-511", **more))

    return by_steps(rows, cell)


@makes("fashion-mnist: Solvers, spacings and eta, 2")
def _(rows: Rows) -> Expected:
    model = "fashion-mnist"
    return by_steps(rows, lambda label, steps: kid(of_steps("quality", model, label[0], steps, "0-511")), model)


def of_50000(label: str, steps: int) -> str:
    """FID of ``UniPC, quadratic, guidance 2.5 in 100 to 700`` and the like."""
    solver, spacing = label.lower().split(", ")[:2]
    settings = {"solver": solver, "spacing": spacing.split()[0], "steps": steps, **guidance_in(label)}
    return f"{quality('cifar10-64', '0-49999', **settings)['FID']:.2f}"


def guidance_in(label: str) -> dict[str, Any]:
    """Of ``guidance 3 away from `cifar10-small` in 300 to 900`` and the like; nothing where there is none."""
    guide = re.search(r"away from `(.+?)`", label)
    scale = re.search(r"([\d.]+)(?: away from \S+)? in (?:timesteps )?(\d+ to \d+)", label)
    return {"guide": guide and guide[1], **guidance_settings(*scale.groups())} if scale else {}


def guidance_settings(guidance: str, interval: str) -> dict[str, Any]:
    """Of ``2.5`` and ``100 to 700``."""
    return {
        "guidance": None if guidance == "none" else float(guidance),
        "guidance_interval": numbers(interval) or None,
    }


@makes("quality: cifar10-64, 1")
def _(rows: Rows) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        return of_50000(labels[0].removeprefix("`cifar10-64`, "), steps)

    *ours, published = rows
    return [*by_steps(ours, cell), published]


@makes("cifar10-64: Solvers, spacings and eta, 2")
def _(rows: Rows) -> Expected:
    found = [(label, quality("cifar10-64", tolerance=float(label))) for label, *_ in rows[1:]]
    return [[label, f"{row['evaluations']:.2f}", f"{row['FID']:.2f}"] for label, row in found]


def solver_settings(label: str) -> dict[str, Any]:
    """Of ``UniPC, 10``, in quadratic steps."""
    solver, steps = label.lower().split(", ")
    return {"solver": solver, "steps": int(steps), "spacing": "quadratic"}


@makes("cifar10-64: Classifier-free guidance, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, guidance, interval, *_ in rows[1:]:
        row = quality("cifar10-64", **solver_settings(label), **guidance_settings(guidance, interval))
        expected.append([label, guidance, interval, f"{row['evaluations']:.0f}", f"{row['FID']:.2f}"])
    return expected


def variety(row: dict[str, Any]) -> list[str]:
    return [f"{row['FID']:.2f}", kid(row), f"{row['precision']:.3f}", f"{row['recall']:.3f}"]


def of_2000(label: str) -> dict[str, Any]:
    settings = {**solver_settings("UniPC, 10"), **guidance_in(label)}
    return quality("cifar10-64", "0-1999", reference="cifar10-test-2000.npz", **settings)


@makes("quality: What guidance costs, 1")
def _(rows: Rows) -> Expected:
    others = quality("cifar10-64", None, images="cifar10-test-others.npz")
    expected: Expected = [["the next 2,000 test images", "", *variety(others)]]
    for label, *_ in rows[2:]:
        row = of_2000(label)
        expected.append([label, evaluations_of(row), *variety(row)])
    return expected


def evaluations_of(row: dict[str, Any]) -> str:
    """How many, and how many of the guide."""
    settings, count = row["settings"], f"{row['evaluations']:.3g}"
    if settings.get("guide") is None:
        return count
    if isinstance(scales := settings["guidance"], list):
        return f"{count} and {sum(scale != 1 for scale in scales)} of the guide"
    low, high = settings["guidance_interval"]
    return f"{count} and {sum(low <= t <= high for t in quadratic(settings['steps']))} of the guide"


@makes("sampling: Which options, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, options, *_ in rows[1:]:
        settings = settings_of(options)
        row = quality("cifar10-64", **settings)
        of_all = found("quality", "cifar10-64", {"seeds": "0-49999", **settings})
        fids = [f"{row['FID']:.2f}", f"{of_all[0]['FID']:.2f}" if of_all else ""]
        expected.append([label, options, evaluations_of(row), *fids])
    return expected


def settings_of(options: str) -> dict[str, Any]:
    """Of a command's options, as the results name them. A scale is asked for, as otherwise the model's card has one."""
    given = sample._parser().parse_args(shlex.split(options.strip("`")))
    assert given.guidance is not None
    guided = {
        "guidance": None if given.guidance == 1 else given.guidance,
        "guidance_interval": given.guidance_interval,
        "guide": given.guide,
    }
    if given.tolerance is not None:
        return {"tolerance": given.tolerance, **guided}
    steps = {
        "solver": given.solver or "ddim",
        "steps": given.steps,
        "spacing": given.spacing or "quadratic",
        "eta": given.eta or 0.0,
    }
    return steps | guided


@makes("cifar10-64: Autoguidance, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for guidance, interval, *_ in rows[1:]:
        guide = None if guidance == "none" else "cifar10-small"
        row = quality("cifar10-64", guide=guide, **solver_settings("UniPC, 10"), **guidance_settings(guidance, interval))
        low, high = numbers(interval) or (0, 999)
        of_guide = f", {sum(low <= t <= high for t in quadratic(10))}" if guide else ""
        expected.append([guidance, interval, f"{row['evaluations']:.0f}{of_guide}", f"{row['FID']:.2f}"])
    return expected


@makes("cifar10-64: Autoguidance, 2")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, guidance, interval, _ in rows[1:]:
        settings = {**solver_settings(label), **guidance_settings(guidance, interval)}
        row = quality("cifar10-64", "0-2047", guide="cifar10-small", **settings)
        expected.append([label, guidance, interval, f"{row['FID']:.2f}"])
    return expected


@makes("cifar10-64: Autoguidance, 3")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for scales, *_ in rows[1:]:
        guidance = [float(scale) for scale in scales.split(", ")]
        settings = {"solver": "unipc", "spacing": "adaptive", "steps": len(guidance), "guidance": guidance}
        row = quality("cifar10-64", guide="cifar10-small", **settings)
        expected.append([scales, evaluations_of(row), f"{row['FID']:.2f}"])
    return expected


def reconstructed(model: str, steps: int, decimals: int) -> str:
    (row,) = found("reconstruction", model, {"solver": "ddim", "spacing": "quadratic", "steps": steps})
    return re.sub(r"\b0\.", ".", with_error(row, "error", decimals))


@makes("cifar10-64: Reconstruction and loss, 1")
def _(rows: Rows) -> Expected:
    decimals = dict(zip((10, 20, 50, 100, 200, 500, 1000), (4, 4, 5, 5, 6, 6, 7), strict=True))
    ours = [reconstructed("cifar10-64", steps, decimals[steps]) for steps in map(int, rows[0][1:])]
    return [[rows[1][0], *ours], rows[2]]  # the second row is published


@makes("fashion-mnist: Reconstruction and loss, 1")
def _(rows: Rows) -> Expected:
    return [["error", *(reconstructed("fashion-mnist", int(steps), 4) for steps in rows[0][1:])]]


@makes("quality: fashion-mnist, 2")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, *_ in rows[1:]:
        if label == "512 other test images":
            row, count = quality("fashion-mnist", None, images="others.npz"), ""
        elif label.startswith("`--tolerance"):
            row = quality("fashion-mnist", tolerance=float(label.strip("`").split()[1]))
            count = f"{row['evaluations']:.2f}"
        else:
            name, steps = label.removesuffix(" steps").rsplit(", ", 1)
            row, count = of_steps("quality", "fashion-mnist", name, int(steps), "0-511"), steps
        expected.append([label, count, *variety({**row, "FID": row["FID-512"]})])
    return expected


def distances(rows: Rows, model: str, seeds: str) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        row = of_steps("trajectory", model, f"ddim, {labels[0]}", steps, seeds)
        return with_error(row, {"pixels": "error", "whitened": "whitened error"}[labels[1]], 4)

    return by_steps(rows, cell, model, labels=2)


@makes("trajectory-error: Spacings: cifar10-64, 1")
def _(rows: Rows) -> Expected:
    return distances(rows, "cifar10-64", "100-123")


@makes("trajectory-error: Spacings: fashion-mnist, 1")
def _(rows: Rows) -> Expected:
    return distances(rows, "fashion-mnist", "100-123")


@makes("trajectory-error: Spacings: fashion-mnist, 2")
def _(rows: Rows) -> Expected:
    return distances(rows, "fashion-mnist", "200-263")


@makes("trajectory-error: Tolerance and second-order solvers, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for counts, errors in zip(rows[1::2], rows[2::2], strict=True):
        cells: list[tuple[str, str]] = []
        for tolerance, printed in zip(rows[0][1:], counts[1:], strict=True):
            settings = {"tolerance": float(tolerance), "seeds": "100-123"}
            (row,) = found("trajectory", named(counts[0]), settings) if printed else (None,)
            cells.append((f"{row['evaluations']:.2f}", with_error(row, "error", 4)) if row else ("", ""))
        expected += [[counts[0], *(count for count, _ in cells)], [errors[0], *(error for _, error in cells)]]
    return expected


@makes("trajectory-error: Tolerance and second-order solvers, 2")
def _(rows: Rows) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        row = of_steps("trajectory", named(labels[0]), labels[0].split(": ")[-1], steps, "100-123")
        return f"{row['error']:.4f}"

    return by_steps(rows, cell)


@makes("trajectory-error: Which distance FID follows, 1")
def _(rows: Rows) -> Expected:
    return [[solver, label, None, None, fid_of_timesteps(solver.lower(), label)] for solver, label, *_ in rows[1:]]


def fid_of_timesteps(solver: str, label: str) -> str | None:
    """Of adaptive timesteps that the results list, or of a spacing that the label names; None where there is no such row."""
    timesteps = numbers(label)
    spacing = label.split("`")[1] if "`" in label else "adaptive"
    if spacing != "adaptive":
        assert timesteps == select_timesteps(SCHEDULE, len(timesteps), spacing).tolist()
    rows = found("quality", "cifar10-64", {"solver": solver, "spacing": spacing, "steps": len(timesteps), "seeds": "0-511"})
    rows = [row for row in rows if row["settings"].get("timesteps", timesteps) == timesteps]
    return f"{rows[0]['FID-512']:.2f}" if rows else None


@makes("training-recipes: A gamma of 5 leaves grain: fashion-mnist, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, model in zip((row[0] for row in rows[1:]), ("fashion-mnist-stage-1", "fashion-mnist"), strict=True):
        (row,) = found("loss", model, {})
        by_timestep = row.get("loss by timestep", {})
        cells = [f"{by_timestep[name]:#.3g}" if name in by_timestep else None for name in rows[0][2:]]
        expected.append([label, with_error(row, "loss", 4), *cells])
    return expected


@makes("training-recipes: A gamma of 5 leaves grain: fashion-mnist, 2")
def _(rows: Rows) -> Expected:
    def cell(labels: list[str], steps: int) -> str:
        stage, solver, spacing = labels[0].lower().split(", ")
        model = {"first stage": "fashion-mnist-stage-1", "second stage": "fashion-mnist"}[stage]
        spacing = spacing.replace("timesteps nearest in pixels", "adaptive")
        return f"{quality(model, solver=solver, spacing=spacing, steps=steps)['FID']:.2f}"

    return by_steps(rows, cell)


# Results of other measurements


@makes("audio: Figures, 1")
def _(rows: Rows) -> Expected:
    noted = result("zen4-two-cores/spoken-digits/recognition.json")
    expected: Expected = []
    for label, kind in (("recordings", "real"), ("generated", "generated")):
        by_voice = [f"{100 * noted['by_voice'][kind][voice]:.0f} %" for voice in rows[0][1:-1]]
        expected.append([label, *by_voice, f"{100 * noted['accuracy'][kind]:.1f} %"])
    return expected


@makes("audio: Figures, 2")
def _(rows: Rows) -> Expected:
    by_std = result("zen4-two-cores/spoken-digits/restyle.json")["by_std"]
    expected: Expected = []
    for label, *_ in rows[1:]:
        noted = by_std["Infinity" if label == "none" else label.removesuffix(" dB")]
        shares = [f"{100 * noted[name]:.0f} %" for name in ("new_word", "new_voice")]
        expected.append([label, *shares, f"{noted['loudness_error']:.1f} dB"])
    return expected


def restored(task: str) -> dict[str, Any]:
    """The record of ``--task super-resolution --factor 2`` and the like."""
    _, name, option, value = task.split()
    record = result(f"zen4-two-cores/restoration/{name}{'-' + value if name == 'super-resolution' else ''}.json")
    assert record["settings"]["task"] == name
    assert option == "--rectangle" or record["settings"][option.removeprefix("--")] == float(value)
    return record


@makes("restoration: Figures, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for label, *_ in rows[1:]:
        record = restored(label.strip("`"))
        means = record["overall"]
        psnr = [f"{means[name]:.2f}" for name in ("psnr_of_pseudo_inverse", "psnr")]
        ssim = [f"{means[name]:.3f}" for name in ("ssim_of_pseudo_inverse", "ssim")]
        worse = sum(image["psnr"] < image["psnr_of_pseudo_inverse"] for image in record["images"].values())
        expected.append([label, *psnr, *ssim, str(worse)])
    return expected


# What the code says of itself


@makes("training: Presets, 1")
def _(rows: Rows) -> Expected:
    expected: Expected = []
    for name in preset_names():
        config = UNetConfig.preset(name)
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in UNet(config).parameters())
        channels = ", ".join(str(config.base_channels * factor) for factor in config.channel_multipliers)
        expected.append([f"`{name}`", str(config.image_shape), channels, f"{parameters / 1e6:.1f}M"])
    return expected


@makes("training: Recipes, 1")
def _(rows: Rows) -> Expected:
    def cell(option: str, recipe: str, absent: str) -> str:
        name, _, device = option.removeprefix("`--").partition("`")
        name = name.replace("-", "_")
        if name == "steps":
            return f"{train._default_steps(recipe, device.split()[-1].lower()):,}"
        value = train._RECIPES[recipe].get(name, getattr(TrainingOptions, name, None))
        return absent if value is None else str(value)

    absent = {"`--prediction-type`": "the preset's", "`--min-snr-gamma`": "none"}
    return [[row[0], *(cell(row[0], recipe, absent.get(row[0], "")) for recipe in ("ddpm", "fast"))] for row in rows[1:]]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_table_is_that_of_the_results(name):
    header, *rows = TABLES[name].rows
    expected = EXPECTED[name]([header, *rows])
    assert [len(row) for row in rows] == [len(row) for row in expected] == [len(header)] * len(rows)
    differences = {
        f"{row[0]} | {title}": f"printed {cell!r}, measured {right!r}"
        for row, wanted in zip(rows, expected, strict=True)
        for title, cell, right in zip(header, row, wanted, strict=True)
        if right not in (None, cell)
    }
    assert not differences


def test_every_table_is_checked_or_listed():
    assert not EXPECTED.keys() & NOT_MEASURED
    assert set(TABLES) == EXPECTED.keys() | NOT_MEASURED | WITHOUT_DATA.keys()
    in_part = {name for name, make in EXPECTED.items() if any(None in row for row in make(TABLES[name].rows))}
    assert in_part == EXPECTED.keys() & WITHOUT_DATA.keys()


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_page_says_what_is_without_data(name):
    assert "not committed" in TABLES[name].around


# Sentences of README.md and of other pages


def prose(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").replace("**", "").split())


README = prose("README.md")


def gpu_sentences() -> list[str]:
    file = "group_norm_silu-corrected"
    groups = {benchmark["group"] for benchmark in result(f"h100/{file}.json")["benchmarks"]}
    norms = [times["compiled"] / times["triton"] for times in (h100_times(file, group) for group in groups)]
    middle = [h100_times("attention", f"attention torch.bfloat16 (512, 1, {shape})") for shape in ("64, 128", "16, 256")]
    attention = [times["compiled"] / times["triton"] for times in middle]
    steps = [h100_times("ddim_step", f"ddim_step batch {batch}") for batch in (512, 16384)]
    (step,) = {f"{times['compiled'] / times['triton']:.1f}" for times in steps}
    return [
        f"GroupNorm + SiLU {min(norms):.1f} to {max(norms):.1f},",
        f"(16 and 64 tokens) {min(attention):.1f} to {max(attention):.1f}, the DDIM step {step},",
    ]


def cpu_sentences() -> list[str]:
    avx512, avx2 = (unet(f"unet-{name}", "cifar10-128 batch 8") for name in ("avx512", "avx2"))
    ratios = [rates["eager fp32"] / rates["diffusers fp32"] for rates in (avx512, avx2)]
    return [
        f"{ratios[0]:.1f} times as fast as diffusers with AVX-512, and {ratios[1]:.1f} times with AVX2.",
        f"A run of 10 steps for one image is {one_image()[0]:.1f} to {one_image()[-1]:.1f} times as fast as OpenVINO in bf16",
    ]


def one_image() -> list[float]:
    """How many times as fast as OpenVINO a captured run of one image is, both in bfloat16; rising."""
    groups = (f"{network} batch 1 steps 10" for network in ("fashion-mnist", "cifar10-64", "cifar10-128"))
    return sorted(rates["captured bf16"] / rates["openvino bf16"] for rates in (unet("sampler-avx512", g) for g in groups))


def sentences_on_captured() -> list[str]:
    small, large = (unet("sampler-avx512", f"{name} batch 1 steps 10") for name in ("fashion-mnist", "cifar10-128"))
    ratios = [rates["captured bf16"] / rates["openvino bf16"] for rates in (small, large)]
    return [
        f"one image of `fashion-mnist` in 10 steps is {ratios[0]:.1f} times as fast as OpenVINO",
        f"For the 35.7M CIFAR-10 network it is {ratios[1]:.1f} times",
    ]


def sentences_on_engines() -> list[str]:
    networks = networks_on_h100()
    ratios = [networks[batch, "diffusers"][0] / networks[batch, "ours"][0] for batch in (64, 512)]
    return [f"{min(ratios):.1f} to {max(ratios):.1f} times as fast in bfloat16"]


def fid(label: str, steps: int, model: str = "cifar10-64", decimals: int = 1) -> str:
    return f"{of_steps('quality', model, label, steps, '0-511')['FID-512']:.{decimals}f}"


@makes("README: How good, 1")
def _(rows: Rows) -> Expected:
    assert {4: "four"}[sum(300 <= t <= 900 for t in quadratic(10))] in rows[3][0]
    best = of_50000("unipc, quadratic, 3 away from `cifar10-small` in 300 to 900", 10)
    figures = [*(of_50000("ddim, quadratic", steps) for steps in (10, 20)), best]
    # A guided evaluation costs a quarter of one more: 10 and 4 times that are as much work as 11.
    return [[row[0], *cells] for row, cells in zip(rows[1:], zip(("10", "20", "11"), figures, strict=True), strict=True)]


@makes("README: Models in the package, 1")
def _(rows: Rows) -> Expected:
    made: Expected = []
    for row in rows[1:]:
        (name,) = re.findall(r"\[`([\w-]+)`\]", row[1])
        with torch.device("meta"):
            network = UNet(UNetConfig.from_dict(json.loads((MODELS / name / "config.json").read_text())))
        made.append([*row[:3], f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M", row[4]])
    return made


@pytest.mark.parametrize("sentences", [gpu_sentences, cpu_sentences])
def test_the_readmes_sentences_are_those_of_the_results(sentences):
    assert [sentence for sentence in sentences() if sentence not in README] == []


def sentences_on_onnx() -> list[str]:
    groups = ("1x32x32 batch 8 steps 20", "3x32x32 batch 8 steps 4")
    rates = [unet("onnx-avx512", group) for group in groups]
    small, large = (f"{r['step by step int8'] / r['step by step fp32']:.1f}" for r in rates)
    error = timed("onnx-avx512", groups[0])["relative error"]["step by step fp32"]
    return [
        f"in float32 they differ by {error:.0e}, relative.".replace("e-0", "e-"),
        f"an int8 export is {small} to {large} times as fast as a float32 one",
    ]


def sentences_on_audio() -> list[str]:
    real, made = (100 * result("zen4-two-cores/spoken-digits/recognition.json")["accuracy"][k] for k in ("real", "generated"))
    return [
        f"recognise {made:.1f} % of its digits, and {real:.1f} % of real recordings",
        f"The classifiers recognise {real:.0f} % of recordings of unheard voices",
    ]


def sentences_on_data() -> list[str]:
    rates = result("zen4-two-cores/data_loading.json")["images_per_s_per_core"]
    small, large = (f"{rates[size] / 1000:.0f} thousand of {size}" for size in ("32x32", "64x64"))
    return [f"from a mapped file: {small} and {large} on a Zen 4 core."]


def sentences_on_restoration() -> list[str]:
    means = [json.loads(file.read_text())["overall"] for file in (RESULTS / "zen4-two-cores/restoration").glob("*.json")]
    gains = [m["psnr"] - m["psnr_of_pseudo_inverse"] for m in means]
    return [f"it gains {min(gains):.0f} to {max(gains):.0f} dB of PSNR over the pseudo-inverse"]


def sentences_on_sampling() -> list[str]:
    unipc = solver_settings("UniPC, 10")
    scaled, limited = (quality("cifar10-64", **unipc, **guidance_settings("2.5", interval)) for interval in ("", "100 to 700"))
    guided = {"guide": "cifar10-small", **unipc}
    away, high = (quality("cifar10-64", **guided, **guidance_settings("2", interval)) for interval in ("", "300 to 900"))
    recalls = [
        f"{of_2000(label)['recall']:.3f}" for label in ("", "3 away from `cifar10-small` in 300 to 900", "2.5 in 100 to 700")
    ]
    adaptive, quadratic = fid_of("unipc, adaptive", 5, "fashion-mnist"), fid_of("ddim, quadratic", 15, "fashion-mnist")
    assert abs(float(adaptive) - float(quadratic)) < 0.5
    noise = [fid_of("ddim, quadratic, eta 1", steps) for steps in (10, 50)]
    half, none = (fid_of(f"ddim, quadratic{eta}", 50, "fashion-mnist") for eta in (", eta 0.5", ""))
    fitted = fid_of("fitted, adaptive", 5)
    assert float(fid_of("unipc, quadratic", 20)) < float(fitted) < float(fid_of("unipc, quadratic", 15))
    return [
        f"In 5 its FID-512 is {fitted}, between that of UniPC in 15 and in 20 steps.",
        f"a scale of 2.5 gives an FID-512 of {scaled['FID']:.2f} in all steps ({scaled['evaluations']:.0f} evaluations), "
        f"and {limited['FID']:.2f} in timesteps 100 to 700 ({limited['evaluations']:.0f} evaluations).",
        f"A scale of 2 in all steps gives an FID-512 of {away['FID']:.2f}, "
        f"and in timesteps 300 to 900 it gives {high['FID']:.2f}.",
        f"recall falls from {recalls[0]} to {recalls[1]}, and to {recalls[2]} by classifier-free guidance",
        f"UniPC in 5 adaptive steps, at {adaptive}, is level with DDIM in 15 quadratic ones.",
        f"an FID-512 of {noise[0]} at 10 steps and of {noise[1]} at 50.",
        f"eta 0.5 in 50 steps scores {half}, and eta 0 {none}.",
    ]


fid_of = functools.partial(fid, decimals=2)


def sentences_on_quality() -> list[str]:
    best = of_50000("unipc, quadratic, 3 away from `cifar10-small` in 300 to 900", 10)
    (loss,) = found("loss", "cifar10-64", {})
    assert float(fid_of("unipc, quadratic", 5)) < float(fid_of("ddim, quadratic", 10))
    few = [of_steps("quality", "fashion-mnist", *run, "0-511") for run in (("UniPC, adaptive", 2), ("DDIM, adaptive", 8))]
    two_steps = quality("fashion-mnist-consistency", solver="consistency", steps=2)
    tuned, unipc, ddim = (kid(row).split()[0] for row in (two_steps, *few))
    return [
        f"reaches an FID of {best} in 10 steps, with four of them guided",
        f"Without guidance DDIM reaches {of_50000('ddim, quadratic', 20)} in 20 steps.",
        f"an FID-512 of {fid_of('unipc, quadratic', 10)} instead of 71.00.",  # the latter without data
        f"the squared error is {float(reconstructed('cifar10-64', 50, 5).split()[0])} a dimension",
        f"The squared error of epsilon on 2,000 test images is {with_error(loss, 'loss', 4)}.",
        f"KID x 1000 in 2 steps is {tuned}, UniPC's {unipc}, and DDIM's in 8 steps {ddim}.",
    ]


@pytest.mark.parametrize(
    ("page", "sentences"),
    [
        ("docs/audio.md", sentences_on_audio),
        ("docs/data.md", sentences_on_data),
        ("docs/captured.md", sentences_on_captured),
        ("docs/engines.md", sentences_on_engines),
        ("docs/onnx.md", sentences_on_onnx),
        ("docs/quality.md", sentences_on_quality),
        ("docs/restoration.md", sentences_on_restoration),
        ("docs/sampling.md", sentences_on_sampling),
    ],
)
def test_a_pages_sentences_are_those_of_the_results(page, sentences):
    assert [sentence for sentence in sentences() if sentence not in prose(page)] == []


def test_every_speed_in_the_readme_is_checked():
    text = README
    for sentence in (*gpu_sentences(), *cpu_sentences()):
        text = text.replace(sentence, "")
    assert re.findall(r".{40}\b(?:[\d.]+|two|three|four|five|ten) (?:x|times|us|ms)\b", text) == []


# The results' own pages


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/*/evaluation.md")), ids=lambda file: "-".join(file.parts[-3:-1]))
def test_an_evaluations_page_is_made_of_its_rows(file):
    assert Results(file.parent).markdown() == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["attention", "ddim_step", "group_norm_silu"])
def test_a_benchmarks_page_is_made_of_its_file(name):
    printed = (RESULTS / "h100" / f"{name}.md").read_text(encoding="utf-8")
    baseline = printed.split(" | ")[1]
    assert table(result(f"h100/{name}.json"), baseline) == printed.rstrip("\n")


@pytest.mark.parametrize("readme", sorted(RESULTS.glob("*/README.md")), ids=lambda file: file.parent.name)
def test_a_readme_names_each_file_beside_it(readme):
    text = readme.read_text(encoding="utf-8")
    assert [file.name for file in readme.parent.iterdir() if f"`{file.stem}" not in text and file != readme] == []
