#!/usr/bin/env bash
# transformers 5.24.0: one transparent picture gives other pixels as a file's path than as a PIL image.
#
# A processor takes paths, URLs or images, and one would guess that a path is short for opening the file. An image with
# transparency is put on white before it becomes RGB; a path goes through `load_image`, which drops the alpha channel,
# so that colours come out that no viewer shows: a logo drawn in white on nothing, stored over black, is seen as a black square.
#
# Output seen (mean of the pixels, from 0 to 1):
#   image: 1.00
#   path: 0.00
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 pillow==13.0.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import sys

import numpy as np
from PIL import Image
from transformers import SiglipImageProcessorPil

path = f"{sys.argv[1]}/transparent.png"
Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
size = {"height": 8, "width": 8}
processor = SiglipImageProcessorPil(do_normalize=False, do_convert_rgb=True, size=size)
found = {}
for name, given in (("image", Image.open(path)), ("path", path)):
    found[name] = float(np.mean(processor(given, return_tensors="np")["pixel_values"]))
    print(f"{name}: {found[name]:.2f}")
assert found == {"image": 1.0, "path": 0.0}
PYTHON
"$directory/venv/bin/python" "$directory/run.py" "$directory" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
