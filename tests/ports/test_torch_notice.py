"""transformers' notice about PyTorch."""

import logging
import os
import subprocess
import sys

import ports  # noqa: F401  (it is what leaves the notice out)

NOTICE = "PyTorch was not found. Models won't be available and only tokenizers can be used."


def test_the_notice_is_hidden_and_other_warnings_are_not():
    logger, seen = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.error(NOTICE)
        logger.error("the tokenizer is old")
    finally:
        logger.removeHandler(handler)
    assert seen == ["the tokenizer is old"]


def test_a_first_time_user_sees_nothing():
    """With PyTorch installed or not."""
    script = "import ports, xlvlm_jax.demo.embedded.blueprint; "
    script += "from xlvlm_jax.demo import embedded; vlm = ports.load_abstract("
    script += "embedded.LLAVA); vlm.processor; import logging; "
    script += "logging.getLogger('transformers.mine').warning('seen')"
    # With CI set, transformers says each line twice.
    theirs = ("TRANSFORMERS_VERBOSITY", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in theirs}
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert [line for line in process.stderr.splitlines() if line] == ["[transformers] seen"]
