#!/usr/bin/env bash
# jax 0.10.2 (the code is the same in 0.12.0): an entry of the persistent compilation cache that was
# cut short is never replaced.
#
# Entries are written in place, not renamed into it, so that a full disk or a killed process leaves
# a part of one. One would guess that a program whose entry can't be read is compiled once more and
# written again, as for a missing entry. It is compiled again, but `put` returns when a file of that
# name exists: every later process reads the same part, warns ("Error reading persistent compilation
# cache entry") and compiles again, until somebody deletes the file.
#
# Output seen:
#   first: 0 hits; entry of 2306 bytes
#   cut to 50 bytes; second: 0 hits, 1 warning; entry of 50 bytes
#   third: 0 hits, 1 warning; entry of 50 bytes
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import sys
import warnings

import jax

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
)
x = jax.device_put(1.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(lambda x: x + 1)(x).block_until_ready()
reading = [w for w in caught if "Error reading persistent compilation cache" in str(w.message)]
print(len(hits), len(reading))
PYTHON
run() { JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py" "$directory/cache"; }
size() { stat -c %s "$directory"/cache/*-cache; }

first=$(run)
whole=$(size)
echo "first: ${first% *} hits; entry of $whole bytes"
truncate -s 50 "$directory"/cache/*-cache
second=$(run)
echo "cut to 50 bytes; second: ${second% *} hits, ${second#* } warning; entry of $(size) bytes"
third=$(run)
echo "third: ${third% *} hits, ${third#* } warning; entry of $(size) bytes"
[ "$first" = "0 0" ] && [ "$second" = "0 1" ] && [ "$third" = "0 1" ] && [ "$(size)" = 50 ]
