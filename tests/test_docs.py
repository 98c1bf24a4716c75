"""The documents: their links lead somewhere, and the files, commands and keys that they name exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dail_jax import config as config_lib
from dail_jax import keys, launch, resources
from dail_jax.errors import UserError
from dail_jax.train.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Files whose comments name commands.
STARTERS = [*sorted(ROOT.glob("configs/**/*.yaml")), *sorted(path for path in ROOT.glob("launch/*") if path.is_file())]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TOP = {path.name for path in ROOT.iterdir() if path.is_dir()} & {
    "benchmarks",
    "configs",
    "dail_jax",
    "docs",
    "launch",
    "tests",
}
NAMED = re.compile(rf"(?<![\w./:-])((?:{'|'.join(sorted(TOP))})/[\w./*-]*\w/?)")
SECTIONS = [name for name, field in config_lib.Config.model_fields.items() if keys.section_in(field.annotation)]
KEY = re.compile(rf"(?<![\w./=:-])((?:{'|'.join(SECTIONS)})(?:\.[A-Za-z0-9_]+)+)(?![\w(/.])")
SUFFIXES = {".py", ".md", ".yaml", ".json", ".jsonl", ".html", ".css", ".js", ".safetensors", ".txt"}
# `dail STAGE ...` and its spellings; what stands before, such as variables of the environment, is ignored.
COMMAND = re.compile(r"(?:^|\s)(?:dail|(?:\S*python3? -m dail_jax(?:\.launch)?))(?=\s|$)(.*)", re.DOTALL)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Inline code, paragraph by paragraph; a span may continue on the next line."""
    return [" ".join(code.split()) for part in re.split(r"\n\s*\n", prose(text)) for code in SPAN.findall(part)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = "".join(c for c in words if c.isalnum() or c in " -_").replace(" ", "-")
        count = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{count}" if count else slug)
    return found


def commands(path: Path) -> Iterator[list[str]]:
    """The words after `dail` of every whole command in a page's code, or in the comments of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        shown = [body for _, language, body in FENCE.findall(text) if language in ("sh", "bash", "")]
        lines = [line for body in shown for line in body.replace("\\\n", " ").splitlines()] + spans(text)
    else:
        comments = re.sub(r"\\\n#", " ", text)
        lines = re.findall(r"^#(?: {2,}|.*`)((?:dail (?! )|python -m dail_jax\b)[^`\n]*)", comments, re.MULTILINE)
    for line in lines:
        if (match := COMMAND.search(line)) and (words := shlex.split(match[1], comments=True)):
            yield words[: next((i for i, word in enumerate(words) if word in (">", "|", "&&")), None)]


def is_placeholder(word: str) -> bool:
    return word in ("...", "…") or word.isupper()


def is_key(path: str) -> bool:
    """Whether a path is a key of the configuration, or inside of one that holds whatever keys it is given."""
    if path.startswith("arms."):
        return "." not in path.removeprefix("arms.") or is_key(path.split(".", 2)[2])
    try:
        keys.find(config_lib.Config, path)
    except UserError:
        parent = path.rpartition(".")[0]
        return bool(parent) and is_key(parent) and keys.find(config_lib.Config, parent).type == "mapping"
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(SPAN.sub("", prose(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    for code in spans(page.read_text(encoding="utf-8")):
        for name in NAMED.findall(code):
            assert list(ROOT.glob(name.rstrip("/"))), name
        if re.fullmatch(r"[\w-]+\.py", code):
            assert [path for top in TOP for path in (ROOT / top).rglob(code)], code


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_that_are_named_exist(page):
    for code in spans(page.read_text(encoding="utf-8")):
        for key in KEY.findall(code):
            assert Path(key).suffix in SUFFIXES or is_key(key), key


@pytest.mark.parametrize("path", [*PAGES, *STARTERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_are_named_parse(path, capsys):
    for words in commands(path):
        if words[0].startswith("-") or is_placeholder(words[0]) or "..." in words or "…" in words:
            continue
        try:
            args = launch.parse(words)
        except SystemExit:
            pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
        for name in args.config:
            known = Path(name).suffix and (ROOT / name).is_file()
            assert known or name in resources.configurations() or is_placeholder(name), words
        for override in [*args.overrides, *getattr(args, "over", ())]:
            assert is_key(override.partition("=")[0]), override
        explained = getattr(args, "explain", None)
        assert explained is None or is_placeholder(explained) or is_key(explained), words


def test_the_commands_are_found():
    """The checks above look at what they are meant to look at."""
    assert ["run", "demo"] in commands(ROOT / "README.md")
    assert len(list(commands(ROOT / "configs" / "paper" / "tau.yaml"))) == 4
    assert sum(len(list(commands(path))) for path in STARTERS) > 25


def test_the_readme_is_an_index():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in ROOT.glob("docs/*.*") if f"(docs/{page.name}" not in text]


def test_the_tree_names_files_that_exist():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## The tree\n")[1]
    names = set(re.findall(r"\b\w+\.py\b", tree))
    assert len(names) > 60
    assert not names - {path.name for path in (ROOT / "dail_jax").rglob("*.py")}


def test_every_method_is_explained():
    table = (ROOT / "docs" / "method.md").read_text().split("## Other methods\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == METHODS.keys()


def test_the_source_names_pages_that_exist():
    files = [path for top in ("dail_jax", "launch", "benchmarks") for path in (ROOT / top).rglob("*.*")]
    files += STARTERS
    for path in files:
        if path.suffix in (".py", ".yaml", ".sh", ".sbatch"):
            for name in re.findall(r"\bdocs/[\w/]+\.\w+", path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), (path, name)
