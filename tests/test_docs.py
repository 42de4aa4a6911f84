"""README.md and the pages of docs/: what they say to type works, their links lead somewhere, and they can be read."""

import importlib
import re
import shlex
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}

# The first line of a block of Python that cannot run in a test says why.
NEEDS = "# needs: "

LONGEST_PAGE, LONGEST_SENTENCE, MEAN_SENTENCE = 150, 30, 18


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands of this package on a page, each as one line."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(python -m ddim_fast\.|torchrun .* -m ddim_fast\.)", line)]


def sentences(page: Path) -> list[str]:
    """The prose of a page, without code, tables, headings and pictures; a link is its text."""
    text = re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|<|    )", line)]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    text = re.sub(r"`[^`]*`", "code", text).replace("*", "")
    paragraphs = re.split(r"\n\s*\n|\n\s*[-\d]+\.?\s", text)
    parts = (re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())) for paragraph in paragraphs)
    return [part for parts_ in parts for part in parts_ if part]


def words(sentence: str) -> int:
    return len(re.findall(r"[^\s]*\w[^\s]*", sentence))


# Those of README.md are run by tests/test_readme.py.
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=named)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page, "python"):
        code = compile(block, named(page), "exec")
        if not block.startswith(NEEDS):
            exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_the_commands_of_a_page_are_understood(page, capsys):
    for line in commands(page):
        found = re.search(r"-m ddim_fast\.(\w+)(.*)", line)
        parser = importlib.import_module(f"ddim_fast.{found[1]}")._parser()
        try:
            parser.parse_args(shlex.split(found[2], comments=True))
        except SystemExit as stop:
            assert stop.code == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) + re.findall(r'(?:src|href)="([^"]+)"', TEXT[page])
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page if not file else (page.parent / file).resolve()
        assert path.exists(), f"{named(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{named(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_can_be_read(page):
    counts = {sentence: words(sentence) for sentence in sentences(page)}
    long = [sentence for sentence, count in counts.items() if count > LONGEST_SENTENCE]
    assert long == []
    assert statistics.mean(counts.values()) < MEAN_SENTENCE
    assert len(TEXT[page].splitlines()) <= LONGEST_PAGE
