"""Checkpoints on disk: configurations, parameters, safetensors, Orbax, PEFT, the Hub's cache.

config                        config.json, and errors for files that do not load
params                        tensors <-> Flax parameters
safetensors_io, orbax_io      the two file formats for parameters
quantised                     reads fp8 with its scales, refuses other quantised checkpoints
fused                         stored tensors in other pieces than the parameters
peft_io                       LoRA adapters in PEFT's format
hub                           names and Hub repositories -> directories
"""

from ports import lazy_names

lazy_names.attach(__name__)
