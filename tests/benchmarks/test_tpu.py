"""Programs for TPU, compiled by the TPU's own compiler; skipped where it is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.tpu import bundles, measured, model_cases, solver_cases
from benchmarks.tpu.chips import CHIPS, Place, place
from benchmarks.tpu.hlo import Program
from ports.parallel import sharding
from xlvlm_jax.solvers import pca

ROOT = Path(__file__).parents[2]
has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed")
ONE = Place("v5e:1", CHIPS["v5e"], (), None)


def benchmark(*arguments):
    """Runs in a separate process: functions traced for a TPU cannot run here."""
    command = [sys.executable, "-m", "benchmarks.tpu", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_one_line_where_libtpu_is_missing(tmp_path):
    if has_libtpu:
        pytest.skip("libtpu is installed")
    done = benchmark("--output", tmp_path / "tpu.json")
    assert done.returncode == 0 and not (tmp_path / "tpu.json").exists()
    assert done.stdout.startswith("libtpu is not installed: pip install")
    assert done.stdout.count("\n") == 1


def test_bytes_per_row_of_many_components():
    """The compiled update of PCA holds what is promised for each row, and not much less."""
    here = ONE._replace(devices=tuple(jax.devices()[:1]))

    def temporaries(rows):
        built = solver_cases.update("pca", 40, rows, here, 1)
        memory = jax.jit(built.function).lower(*built.arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes, built.row_bytes

    (few, promised), (more, _) = temporaries(8192), temporaries(16384)
    blocks = pca.blocks_for(40, 8192, solver_cases.D)
    # By hand: 96 axes, twice, and two blocks of 32 columns and the one that is multiplied.
    assert blocks == (32, 5, 2, 96) and promised == 4 * (2 * 96 + 3 * 32)
    assert 0.5 * promised < (more - few) / 8192 <= promised


def test_a_program_that_does_not_fit():
    refusal = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 33.00G of 15.75G hbm. Exceeded hbm capacity by 17.25G.\n\nTotal hbm usage"
    )
    line = measured.too_large(refusal, "kmeans solve", ONE)
    assert line == (
        "kmeans solve does not fit v5e:1: it needs 33.00G of 15.75G hbm, 17.25G too many; use 3 "
        "times as many devices, or 1/3 of the rows"
    )
    refusal = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (32.06G) exceeds available HBM (15.75G)."
    )
    assert measured.too_large(refusal, "x", ONE) == (
        "x does not fit v5e:1: it needs 32.06G of 15.75G hbm, 16.31G too many; use 3 times as many "
        "devices, or 1/3 of the rows"
    )
    assert measured.too_large("INTERNAL: no\nmore", "x", ONE) == (
        "x does not compile for v5e:1: INTERNAL: no"
    )


# A loop of 18 steps with one of 8 in it. A branch back has places after it, which hold what belongs
# to the outer loop; and bundles of the outer loop are moved into the inner one.
BUNDLES = """
     0   :  { %s1 = inlined_call_operand.hbm }
   0x1 LB: > { %s2 = smov 0 }
   0x2   : > { %v1 = vld [vmem:[%s2]] }
   0x3   :  {}
   0x4 LB: >> { %v2 = vadd.f32 %v1, %v1 }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s3, 8 /* loop exit test */ }
   0x6   : > { %v3 = vmul.f32 %v1, %v1 }
   0x7   : >> { %9 = sbr.rel (!%p1) target = $region2 }
   0x8   : > { %p2 = scmp.ge.s32.totalorder %s4, 18 /* loop exit test */ }
   0x9   : > { %8 = sbr.rel (!%p2) target = $region1 }
   0xa   :  { %7 = vsyncpa [#allocation4], 1 }
"""


def test_cycles_of_bundles():
    outer = bundles.read(BUNDLES)
    inner = bundles.Loop(8, 4, [])
    assert outer == bundles.Loop(18, 5, [inner])
    assert outer.of_step == 5 + 8 * 4 and outer.cycles == 18 * (5 + 8 * 4)
    with pytest.raises(ValueError, match="expected the bundles of one loop over blocks, got 0"):
        bundles.read("   0   :  { %s1 = smov 0 }")


def test_no_bundles(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no bundles of a kernel 'nearest'"):
        bundles.of_kernel(tmp_path, "nearest")


def test_an_unknown_chip():
    with pytest.raises(ValueError, match=r"topology 'v9x:2x2' is of no chip in v5e, v5p, v6e;"):
        place("v9x:2x2")


def test_a_mesh_that_does_not_divide_the_model():
    def on(data, model):
        mesh = sharding.abstract_mesh(data, model)
        return model_cases.check_mesh("qwen2-vl-7b", ONE._replace(mesh=mesh))

    with pytest.raises(ValueError) as refused:
        on(2, 8)
    assert str(refused.value) == (
        "mesh 2x8 does not divide qwen2-vl-7b: 28 heads over 8 devices; choose a size of `model` "
        "among 1, 2, 4, 7, 14, 28"
    )
    assert on(2, 4) is None and on(16, 1) is None


LAYER = """
HloModule jit_f

ENTRY %main (x: f32[64]) -> f32[8,32,600,600] {
  %x = f32[64]{0} parameter(0)
  %small = f32[2,32,600,600]{3,2,1,0} custom-call(%x), metadata={op_name="layers_1/self_attn/dot"}
  %half = bf16[8,32,600,600]{3,2,1,0} custom-call(%x), metadata={op_name="layers_1/self_attn/dot"}
  %wide = f32[8,32,600,900]{3,2,1,0} custom-call(%x), metadata={op_name="layers_1/mlp/dot"}
  %apart = f32[8,32,600,600]{3,2,1,0} custom-call(%x), metadata={op_name="lm_head/dot"}
  ROOT %scores = f32[8,32,600,600]{3,2,1,0} custom-call(%x), metadata={op_name="layers_1/self_attn/dot"}
}
"""  # noqa: E501


def test_large_scores_of_attention_are_found():
    ((array, origin),) = measured.scores(Program(LAYER))
    assert (str(array), origin) == ("f32[8,32,600,600]", "layers_1/self_attn/dot")


# 32 GiB, twice what one chip holds and more.
TOO_LARGE = """
import jax, jax.numpy as jnp
from benchmarks.tpu import chips, measured
from benchmarks.tpu.cases import Built, Case

jax.config.update("jax_platforms", "cpu")
def build(place, times):
    Z = place.abstract((1 << 21, 4096), jnp.float32)
    return Built(lambda Z: Z.T @ Z, (Z,))

try:
    measured.measure(Case("products", build), chips.place("v5e:1"))
except ValueError as error:
    print(error)
"""


@needs_libtpu
@pytest.mark.slow
def test_libtpu_says_by_how_much_a_program_is_too_large():
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE], cwd=ROOT, capture_output=True, text=True
    )
    line = done.stdout.strip()
    assert line.startswith("products does not fit v5e:1: it needs 32."), done.stderr[-500:]
    assert "of 15.75G hbm" in line and line.endswith("3 times as many devices, or 1/3 of the rows")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--topologies", "v5e:3x5"], "error: libtpu does not know topology 'v5e:3x5': "),
        (["--mesh", "3x1", "--topologies", "v5e:2x2"], "error: mesh 3x1 has 3 devices, v5e:2x2"),
        (["--programs", "kmeens"], "error: no program 'kmeens'; choose solvers, models, or of "),
        (
            ["--kernels", "--topologies", "v5e:2x2"],
            "error: a kernel runs on each device alone, v5e:2x2 has 4; choose v5e:1",
        ),
        (
            ["--programs", "models", "--mesh", "1x16", "--topologies", "v5e:4x4"],
            "error: mesh 1x16 does not divide qwen2-vl-7b: 28 heads over 16 devices; choose ",
        ),
    ],
)
def test_bad_arguments(arguments, line):
    done = benchmark(*arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line)


@needs_libtpu
@pytest.mark.slow
def test_small_programs_keep_all_rules(tmp_path):
    names = ["semi-nmf tile", "kmeans tile", "pca tile", "semi-nmf update", "kmeans update"]
    names += ["pca update", "pca 50 update", "kmeans 16384 update", "semi-nmf 1024 update"]
    done = benchmark(
        "--programs", *names, "--topologies", "v5e:1", "--output", tmp_path / "one.json"
    )
    assert done.returncode == 0, done.stdout
    rows = {row["program"]: row for row in json.loads((tmp_path / "one.json").read_text())["rows"]}
    assert set(rows) == set(names)
    assert all(not row["broken"] and row["cycles"] > 0 for row in rows.values())
    done = benchmark(
        "--programs", "kmeans update", "semi-nmf update", "--growth",
        "--topologies", "v5e:2x2", "--output", tmp_path / "four.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "four.json").read_text())["rows"]
    assert all({each["kind"] for each in row["collectives"]} == {"all-reduce"} for row in rows)


@needs_libtpu
@pytest.mark.slow
def test_kernels_fit_and_read_fast(tmp_path):
    """K = 20: within 1.3 times what reading Z once takes."""
    done = benchmark(
        "--kernels", "--topologies", "v5e:1", "v5p:1", "v6e:1", "--output", tmp_path / "k.json"
    )
    assert done.returncode == 0, done.stdout
    for row in json.loads((tmp_path / "k.json").read_text())["rows"]:
        assert not row["broken"]
        if row["K"] == 20:
            assert row["cycles"] <= 1.3 * row["cycles of one read"]


@needs_libtpu
@pytest.mark.slow
def test_models_whose_checkpoints_have_fused_layers_send_sums_alone(tmp_path):
    # No step of LoRA: at this depth LLaVA's takes 52 seconds of a core and Molmo's 107; with one
    # layer, one crop and 256 positions still 64. See LORA_STEP below.
    done = benchmark(
        "--programs", "molmo-7b-d extraction", "qwen2-vl-7b extraction",
        "--topologies", "v5e:2x2", "--mesh", "1x4", "--output", tmp_path / "models.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert all({each["kind"] for each in row["collectives"]} == {"all-reduce"} for row in rows)


# One layer at its real width. What devices send is decided before the program is one of a CPU or a
# TPU; the kernel of attention, which only a TPU has, sends nothing.
LORA_STEP = """
import sys
import jax
from benchmarks.tpu import measured, model_cases
from benchmarks.tpu.chips import CHIPS, Place
from benchmarks.tpu.hlo import Program
from ports.models.molmo.model import Molmo
from ports.parallel import sharding

model_cases.CUT["molmo-7b-d"]["num_hidden_layers"] = 1
Molmo.axes = Molmo.axes | eval(sys.argv[1])
place = Place("cpu", CHIPS["v5e"], tuple(jax.devices()), sharding.make_mesh(1, 4))
built = model_cases.lora_step("molmo-7b-d", False, place, 1)
lowered = jax.jit(built.function, donate_argnums=built.donate).lower(*built.arguments)
program = Program(lowered.compile().as_text())
print({each["kind"] for each in measured.collectives(program)})
print(*measured.broken(built, {"share of memory": 0}, program, place), sep="\\n")
"""


def lora_step(**rules):
    """Returns the kinds of collectives of Molmo's LoRA step with such rules, and what is broken."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", LORA_STEP, repr(rules)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds, *broken = done.stdout.splitlines()
    return kinds, [line for line in broken if line]


def test_a_lora_step_of_molmo_sends_sums_alone():
    assert lora_step() == ("{'all-reduce'}", [])


@pytest.mark.slow
def test_wrong_rules_of_a_lora_step_are_found():
    # A layer whose rows should be divided: what it reads is gathered.
    kinds, broken = lora_step(attn_out=("embed", "heads"), ff_out=())
    assert "all-gather" in kinds
    assert any(line.startswith("all-gather in a layer: ") for line in broken)
    assert any("ff_out" in line and line.endswith("is on every device") for line in broken)
