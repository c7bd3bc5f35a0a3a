"""The ports: one file or folder per model family, named like its model_type in config.json."""
