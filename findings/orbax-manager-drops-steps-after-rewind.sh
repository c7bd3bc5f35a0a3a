#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: after a restore of an earlier step, `CheckpointManager.save` stores nothing
# until the run is past the last step on disk.
#
# A run that diverged is restored at an earlier step and continued. One would guess that a step that is
# saved again replaces the one of that number, or raises `StepAlreadyExistsError`, which exists. But
# `save` returns False for every step up to the latest on disk, also for numbers that are not there, and
# warns of nothing: the directory then holds the abandoned run's steps beside the new run's, and whoever
# restores the "latest" after a crash in between goes on with the abandoned run. `force=True` saves a
# step that is not there, but from then on `latest_step()` is the last step saved, not the highest:
# another process that opens the same directory gets another answer.
#
# Output seen:
#   after a restore of step 4: saved {5: False, 6: False, 7: False, 8: False, 9: True}
#   steps on disk, and whose they are: {6: 'abandoned', 8: 'abandoned', 9: 'new'}
#   forced 5: latest step here 5, in a new manager 9
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import sys
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

directory = Path(sys.argv[1])


def manager() -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(directory, options=options, item_handlers=handler)


def save(steps: ocp.CheckpointManager, step: int, value: float, **how: bool) -> bool:
    saved = steps.save(step, args=ocp.args.StandardSave({"w": jnp.full(3, value)}), **how)
    steps.wait_until_finished()
    return saved


with manager() as steps:
    for step in (2, 4, 6, 8):
        save(steps, step, 1.0)

with manager() as steps:
    steps.restore(4)
    saved = {step: save(steps, step, -1.0) for step in (5, 6, 7, 8, 9)}
    print("after a restore of step 4: saved", saved)
    whose = {s: "new" if steps.restore(s)["w"][0] < 0 else "abandoned" for s in steps.all_steps()}
    print("steps on disk, and whose they are:", whose)

with manager() as steps:
    save(steps, 5, -1.0, force=True)
    here = steps.latest_step()
with manager() as steps:
    there = steps.latest_step()
print(f"forced 5: latest step here {here}, in a new manager {there}")

assert saved == {5: False, 6: False, 7: False, 8: False, 9: True}
assert whose == {6: "abandoned", 8: "abandoned", 9: "new"}
assert (here, there) == (5, 9)
PYTHON
"$directory/venv/bin/python" "$directory/run.py" "$directory/steps" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
grep -i "skip\|exist" "$directory/errors" || true
