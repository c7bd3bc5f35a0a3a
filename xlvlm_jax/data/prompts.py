"""The reference's prompts, without a model's chat template."""

CAPTION = "\nProvide a one-sentence caption for the provided image."

DESCRIPTION = "Describe the image in detail."
QUESTION = "{question}\nAnswer the question using a single word or phrase."


def question(text: str, template: str = QUESTION) -> str:
    """Returns a VQA question with the instruction that asks for a short answer.

    Args:
        text: the question.
        template: the prompt, with {question} in place of the question.

    Raises:
        ValueError: the template does not hold {question}.
    """
    if "{question}" not in template:
        raise ValueError(f"the prompt is {template!r}; expected a text that holds {{question}}")
    return template.replace("{question}", text)
