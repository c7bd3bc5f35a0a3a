"""`--protocol xl-vlms`: sets every option that makes a command compute what XL-VLMs computes."""

from typing import Annotated, Any, Literal

import typer

# Command -> its options and their values; what the user gives counts before these.
XL_VLMS: dict[str, dict[str, Any]] = {
    "extract": {
        "containing_match": "substring",
        "containing_in": "first",
        "first": True,
        "max_new_tokens": 50,
    },
    "ground": {"word_rules": "xl-vlms", "through_norm": False},
    "score": {"word_rules": "xl-vlms", "through_norm": False},
    "shift": {"word_rules": "xl-vlms", "through_norm": False},
    "evaluate": {"vqa_protocol": "xl-vlms", "max_new_tokens": 50},
    "apply": {"vqa_protocol": "xl-vlms", "max_new_tokens": 50},
}


def _set_defaults(context: typer.Context, protocol: str | None) -> str | None:
    """Makes the protocol's values the defaults of the options, which are read after this one."""
    if protocol is not None:
        name = context.command.name or ""
        context.default_map = {**(context.default_map or {}), **XL_VLMS[name]}
    return protocol


Protocol = Annotated[
    Literal["xl-vlms"] | None,
    typer.Option(
        is_eager=True,
        callback=_set_defaults,
        help="xl-vlms: set all options but --dtype so that the command computes what XL-VLMs "
        "computes; other options on the command line take precedence.",
    ),
]
