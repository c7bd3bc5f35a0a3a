"""The reference's prompts, without a model's chat template."""

CAPTION = "\nProvide a one-sentence caption for the provided image."


def question(text: str) -> str:
    """Returns a VQA question with the instruction that asks for a short answer."""
    return f"{text}\nAnswer the question using a single word or phrase."
