"""The README and the documentation do what they show: snippets run, outputs are as printed.

Python blocks of a page run one after the other in one namespace and one directory, as a reader
would paste them. A block of text right below one is its expected output: "..." matches anything, as
in doctest. Commands in sh blocks are parsed by the current command line; those on the pages in RUN
are also run.
"""

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN = ("docs/quickstart.md",)
_FENCE = re.compile(r"^( *)```(\w+)?[^\n]*\n(.*?)^\1```[ ]*$", re.M | re.S)
_SAME = doctest.OutputChecker()


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts on, its expected output."""

    language: str
    text: str
    line: int
    output: str | None


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page; a text block right after another is its output."""
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(page):
        indent, language, text = match[1], match[2] or "", match[3]
        text = re.sub(rf"^{indent}", "", text, flags=re.M)
        near = found and not page[end : match.start()].strip()
        if language == "text" and near and found[-1].output is None:
            found[-1] = found[-1]._replace(output=text)
        else:
            line = page[: match.start()].count("\n") + 2
            found.append(Block(language, text, line, None))
        end = match.end()
    return found


def name(page: Path) -> str:
    """Returns the name of a page in the names of tests."""
    return page.relative_to(ROOT).as_posix()


def require_same(expected: str, got: str, where: str) -> None:
    """Fails if a page shows a different output from what was printed."""
    got = "\n".join(line.rstrip() for line in got.splitlines()) + "\n"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert _SAME.check_output(expected, got, flags), f"{where} shows\n{expected}\nand prints\n{got}"


def commands(text: str) -> list[list[str]]:
    """Returns the arguments of each `xlvlm` command in an sh block, without comments."""
    joined = text.replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [words[1:] for words in lines if words[:1] == ["xlvlm"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns the directory where snippets run; pages can use the files of earlier ones."""
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_runs_and_prints_what_the_page_shows(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace: dict = {"__name__": "page"}
    for block in blocks(page.read_text("utf-8")):
        if block.language != "python":
            continue
        where = f"{page}:{block.line}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        if block.output is not None:
            require_same(block.output, printed.getvalue(), where)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_the_options_that_the_page_gives_them(page):
    from xlvlm_jax.cli import app

    for block in blocks(page.read_text("utf-8")):
        for arguments in commands(block.text) if block.language == "sh" else ():
            name, command = "xlvlm", typer.main.get_command(app)
            while arguments and arguments[0] in getattr(command, "commands", {}):
                name, *arguments = arguments
                command = command.commands[name]
            # "..." stands for options that were shown before.
            whole = [word for word in arguments if word != "..."]
            shortened = len(whole) < len(arguments)
            try:
                command.make_context(name, whole, resilient_parsing=shortened)
            except Exception as error:
                pytest.fail(f"{page}:{block.line}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_and_files_in_the_text_exist(page):
    """XL-VLMs' own options have underscores."""
    from xlvlm_jax.cli import app

    def options(command) -> set[str]:
        own = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        return own.union(*map(options, getattr(command, "commands", {}).values()))

    benchmarks = "".join(file.read_text("utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
    known = options(typer.main.get_command(app)).union(re.findall(r'"(--[a-z-]+)"', benchmarks))
    for code in re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text("utf-8"))):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert "_" in option or option in known | {"--help"}, f"{page}: {option}"
        for path in re.findall(r"^(?:benchmarks|docs|ports|tests|xlvlm_jax)/[\w/.-]+", code):
            assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_print_what_the_page_shows(page, tmp_path, monkeypatch, xlvlm):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks((ROOT / page).read_text("utf-8")):
        if block.language != "sh" or block.output is None or "pip" in block.text:
            continue
        printed = ""
        for arguments in commands(block.text):
            status, out, err = xlvlm(*arguments)
            assert status == 0, err
            printed, ran = printed + out, ran + 1
        require_same(block.output, printed, f"{page}:{block.line}")
    assert ran
