"""Pages that mkdocs generates at build time, from the code and the notebooks.

commands.md          the command line, from the commands of `xlvlm`
notebooks/*.md       the notebooks, with their stored outputs

The build fails if a page would load anything from another host.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = "commands.md"
_HEAD = """# Command line

`xlvlm COMMAND --help` shows the same in the terminal. Commands exit with status 2 for bad
arguments or input and with 1 for a failed run; `xlvlm --debug COMMAND` shows the traceback.
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to those in the folder."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=commands()))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        for name, content in notebook(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to the pages of notebooks instead of the notebooks, which a checkout has."""
    return re.sub(r"\]\((notebooks/[\w-]+)\.ipynb\)", r"](\1.md)", markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Checks that a page loads no script, style, font or picture from another host.

    Raises:
        PluginError: it does.
    """
    from mkdocs.exceptions import PluginError

    if found := loads(output):
        raise PluginError(f"{page.file.src_uri} loads {found[0]}; store the file next to the page")
    return output


def loads(html: str) -> list[str]:
    """Returns the addresses on other hosts that a browser loads to show a page."""
    return [address for pattern in _LOADS for address in pattern.findall(html)]


_LOADS = (
    re.compile(
        r"""<(?:script|img|iframe|source|embed|video|audio)\b[^>]*?\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    ),
    re.compile(
        r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|icon|preconnect))[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    ),
    re.compile(r"""@import\s+(?:url\()?["']?((?:https?:)?//[^"'\s)]+)"""),
    re.compile(r"""url\(["']?((?:https?:)?//[^"')]+)"""),
)


def notebook(path: Path) -> dict[str, str | bytes]:
    """Returns {file name: content} of a notebook's page, with outputs, and of its pictures."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(
        str(path), resources={"unique_key": path.stem, "output_files_dir": path.stem}
    )
    return {f"{path.stem}.md": text, **resources.get("outputs", {})}


def commands() -> str:
    """Returns the page: for each command a heading, its usage, and tables of its options."""
    from xlvlm_jax.cli import app

    root = typer.main.get_command(app)
    context = root.make_context("xlvlm", [], resilient_parsing=True)
    return "\n".join([_HEAD, *_below(context, root, level=2)]) + "\n"


def _below(context: Any, command: Any, level: int) -> Iterator[str]:
    """Yields the text of each command in a group, followed by its subcommands."""
    for name, each in getattr(command, "commands", {}).items():
        inner = each.make_context(name, [], parent=context, resilient_parsing=True)
        yield f"{'#' * level} {inner.command_path}\n"
        yield f"{inspect.cleandoc(each.help or '')}\n"
        if getattr(each, "commands", {}):
            yield from _below(inner, each, level + 1)
            continue
        yield f"```text\n{' '.join([inner.command_path, *each.collect_usage_pieces(inner)])}\n```\n"
        yield from _parameters(inner, each)


def _parameters(context: Any, command: Any) -> Iterator[str]:
    """Yields a table of the arguments, and one per help panel of options."""
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts:
            continue
        kind = "Options" if parameter.param_type_name == "option" else "Arguments"
        panel = getattr(parameter, "rich_help_panel", None) or kind
        name, text = (" ".join(part.split()).replace("|", "\\|") for part in record)
        # Older releases of typer escape brackets themselves.
        text = text.replace("\\[", "[").replace("[", "\\[").replace("<", "&lt;")
        panels.setdefault(panel, []).append(f"| `{name}` | {text} |")
    for panel, rows in panels.items():
        yield f"| {panel} | |\n| --- | --- |"
        yield "\n".join(rows) + "\n"
