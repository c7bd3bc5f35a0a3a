"""transformers' notice on import that PyTorch is missing: here nothing needs it."""

import logging


def _is_other(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def leave_out() -> None:
    """Leaves out that one line, and no other of transformers' warnings."""
    logging.getLogger("transformers").addFilter(_is_other)
