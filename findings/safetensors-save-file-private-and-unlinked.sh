#!/usr/bin/env bash
# safetensors 0.8.0: files that `save_file` writes are readable by their owner alone, and a link is replaced by a file.
#
# One would guess what most writers do and safetensors 0.7.0 did: a new file has the mode that
# the umask leaves (rw-r--r--), a file that exists keeps its mode, and a symbolic link is written through.
# 0.8.0 writes a temporary file and renames it, for NumPy and torch (new files) alike: every file ends as rw-------,
# even one that its group could write before, so colleagues and the jobs of a shared machine can't read
# the checkpoint; and a link, such as those in which caches of models hold their files, becomes a
# file of its own, while the file that it named keeps the old tensors.
#
# Output seen (umask 022):
#   0.7.0: numpy new 644, over one of mode 664: 664, over a link: still a link; torch new 644
#   0.8.0: numpy new 600, over one of mode 664: 600, over a link: no link; torch new 600
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import os
import stat

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch


def mode(file):
    return f"{stat.S_IMODE(os.stat(file).st_mode):o}"


os.umask(0o022)
old, new = {"a": np.zeros(3, np.float32)}, {"a": np.ones(3, np.float32)}
safetensors.numpy.save_file(old, "new.safetensors")
for name in ("shared", "target"):
    safetensors.numpy.save_file(old, f"{name}.safetensors")
    os.chmod(f"{name}.safetensors", 0o664)
os.symlink("target.safetensors", "link.safetensors")
for name in ("shared", "link"):
    safetensors.numpy.save_file(new, f"{name}.safetensors")
safetensors.torch.save_file({"a": torch.ones(3)}, "torch.safetensors")
is_link = os.path.islink("link.safetensors")
behind = safetensors.numpy.load_file("target.safetensors")["a"][0]
modes = [mode(f"{name}.safetensors") for name in ("new", "shared", "torch")]
print(
    f"{safetensors.__version__}: numpy new {modes[0]}, over one of mode 664: {modes[1]}, over a link: "
    f"{'still a link' if is_link else 'no link'}; torch new {modes[2]}"
)
if safetensors.__version__ == "0.7.0":
    assert modes == ["644", "664", "644"] and is_link and behind == 1
else:
    assert modes == ["600", "600", "600"] and not is_link and behind == 0
PYTHON
for version in 0.7.0 0.8.0; do
    python3 -m venv "$directory/$version"
    "$directory/$version/bin/pip" install --quiet safetensors==$version numpy==2.3.5 torch==2.13.0 packaging==25.0
    mkdir "$directory/files-$version"
    (cd "$directory/files-$version" && "$directory/$version/bin/python" "$directory/run.py")
done
