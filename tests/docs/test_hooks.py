"""The pages that are generated when the site is built."""

import importlib.util
import sys
from pathlib import Path

import pytest
import typer

PATH = Path(__file__).parents[2] / "docs" / "hooks.py"


@pytest.fixture(scope="module")
def hooks():
    """Returns docs/hooks.py, loaded as a file, as mkdocs does."""
    specification = importlib.util.spec_from_file_location("docs_hooks", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.modules.pop("docs_hooks", None)


def every_command(command, path="xlvlm"):
    """Yields (path, command) for each command that can be run."""
    below = getattr(command, "commands", {})
    for name, each in below.items():
        yield from every_command(each, f"{path} {name}")
    if not below:
        yield path, command


def test_page_of_commands_holds_every_command_and_option(hooks):
    from xlvlm_jax.cli import app

    page = hooks.commands()
    found = dict(every_command(typer.main.get_command(app)))
    assert "xlvlm extract" in found and "xlvlm steer fit" in found
    for path, command in found.items():
        _, _, section = page.partition(f" {path}\n")
        section = section.partition("\n## ")[0].partition("\n### ")[0]
        assert section, path
        for parameter in command.params:
            if parameter.param_type_name == "option" and "--help" not in parameter.opts:
                assert f"`{parameter.opts[0]}" in section, (path, parameter.opts)


def test_text_of_an_option_is_the_help_with_its_default(hooks):
    page = hooks.commands()
    section = page.partition("## xlvlm demo\n")[2].partition("\n## ")[0]
    line = next(line for line in section.splitlines() if "--num-concepts" in line)
    assert r"\[default: 20]" in line


def test_links_to_notebooks_lead_to_their_pages_on_the_site(hooks):
    markdown = "[a](notebooks/a-b.ipynb), [c](guides/c.md) and `notebooks/d.ipynb`"
    got = hooks.on_page_markdown(markdown, None, None, None)
    assert got == "[a](notebooks/a-b.md), [c](guides/c.md) and `notebooks/d.ipynb`"


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<script async src=//cdn.example/x.js></script>",
        '<img alt="a" src="http://cdn.example/x.png">',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="https://fonts.example" rel="preconnect">',
        '<style>@import "https://cdn.example/x.css";</style>',
        "<style>a{background:url(https://cdn.example/x.png)}</style>",
    ],
)
def test_files_from_other_hosts_are_found(hooks, html):
    (address,) = set(hooks.loads(html))
    assert "example" in address


@pytest.mark.parametrize(
    "html",
    [
        '<a href="https://github.com/mshukor/xl-vlms">XL-VLMs</a>',
        '<script src="../assets/x.js"></script>',
        '<link rel="stylesheet" href="assets/x.css">',
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        '<img src="data:image/png;base64,AAAA//AA">',
    ],
)
def test_links_and_the_sites_own_files_do_not_count(hooks, html):
    assert hooks.loads(html) == []
