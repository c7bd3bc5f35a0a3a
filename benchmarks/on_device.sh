#!/usr/bin/env bash
# Checks and measures this project on the accelerator of this machine, in under four minutes:
#
#     benchmarks/on_device.sh                      # writes benchmarks/results/on_device-CARD.json
#     PYTHON=/path/to/python3 benchmarks/on_device.sh --output DIR
#
# Uses the Python that is there and nothing from the network. It needs jax, flax, numpy, optax,
# transformers, pillow, rich and jaxtyping; the project itself need not be installed. Exits with
# status 1 if a value differs from the CPU's, 2 if there is no accelerator, 3 if it was not done in
# time. See benchmarks/on_device.py for what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1
# The processor's reference run takes no memory of the card; this one takes it as it needs it.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -u -m benchmarks.on_device "$@"
