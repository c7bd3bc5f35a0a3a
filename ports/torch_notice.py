"""Hides the notice that transformers logs on import without PyTorch, which is not needed here."""

import logging


def _is_other(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def leave_out() -> None:
    """Hides that one line; all other warnings of transformers still show."""
    logging.getLogger("transformers").addFilter(_is_other)
