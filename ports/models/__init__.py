"""The ports: one file or folder for each model family, named as in config.json's model_type."""
