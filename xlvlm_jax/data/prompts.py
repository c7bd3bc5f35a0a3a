"""The prompts of the reference, before a model's chat template is put around them."""

CAPTION = "\nProvide a one-sentence caption for the provided image."


def question(text: str) -> str:
    """A VQA question with the instruction that asks for a short answer."""
    return f"{text}\nAnswer the question using a single word or phrase."
