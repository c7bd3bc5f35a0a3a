"""What a model is given: prompts with images, token ids, and how rows are padded."""
