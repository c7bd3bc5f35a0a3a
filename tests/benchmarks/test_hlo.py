"""Figures of a compiled program from its text, by hand and against a program of this machine."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu.hlo import Array, Program

# Four steps that each read a quarter of Z, then a loop of unknown length that reads all of it, adds
# over devices in a branch that is cheaper than the other, and gathers inside of a fusion.
TEXT = """
HloModule jit_f, is_scheduled=true

%plus (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%part (z: f32[64,512], i: s32[]) -> f32[512] {
  %z = f32[64,512]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[16,512]{1,0} dynamic-slice(%z, %i, %zero), dynamic_slice_sizes={16,512}
  %ones = f32[1,16]{1,0} constant({...})
  ROOT %dot = f32[1,512]{1,0} convolution(%ones, %slice), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%all (z: f32[64,512]) -> f32[512,64] {
  %z.1 = f32[64,512]{1,0} parameter(0)
  %same = f32[512,64]{0,1} bitcast(%z.1)
  ROOT %twice = f32[512,64]{0,1} add(%same, %same)
}

%gathering (x: f32[512]) -> f32[4,512] {
  %x = f32[512]{0} parameter(0)
  ROOT %gather = f32[4,512]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}

%counts (c: (s32[], f32[64,512])) -> pred[] {
  %c = (s32[], f32[64,512]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%n, %four), direction=LT
}

%block (c: (s32[], f32[64,512])) -> (s32[], f32[64,512]) {
  %c.1 = (s32[], f32[64,512]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%c.1), index=0
  %z.2 = f32[64,512]{1,0} get-tuple-element(%c.1), index=1
  %partial = f32[1,512]{1,0:T(1,128)S(1)} fusion(%z.2, %n.1), kind=kOutput, calls=%part, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[64,512]{1,0}) tuple(%n.1, %z.2)
}

%unknown (c: (s32[], f32[64,512])) -> pred[] {
  %c.2 = (s32[], f32[64,512]{1,0}) parameter(0)
  %n.2 = s32[] get-tuple-element(%c.2), index=0
  ROOT %less.1 = pred[] compare(%n.2, %n.2), direction=LT
}

%cheap (x: f32[512]) -> f32[512] {
  %x.1 = f32[512]{0} parameter(0)
  ROOT %total = f32[512]{0} all-reduce(%x.1), replica_groups={{0,1,2,3}}, to_apply=%plus, metadata={op_name="jit(f)/layers_0/add"}
}

%dear (x: f32[512]) -> f32[512] {
  %x.2 = f32[512]{0} parameter(0)
  ROOT %slow = f32[512]{0} fusion(%x.2), kind=kLoop, calls=%plus, backend_config={"window_config":{"estimated_cycles":"9000"}}
}

%update (c: (s32[], f32[64,512])) -> (s32[], f32[64,512]) {
  %c.3 = (s32[], f32[64,512]{1,0}) parameter(0)
  %n.3 = s32[] get-tuple-element(%c.3), index=0
  %z.3 = f32[64,512]{1,0} get-tuple-element(%c.3), index=1
  %turned = f32[512,64]{0,1} fusion(%z.3), kind=kLoop, calls=%all, backend_config={"window_config":{"estimated_cycles":"30"}}
  %near = f32[64,512]{1,0:T(8,128)S(1)} copy(%z.3)
  %again = f32[512,64]{0,1} fusion(%near), kind=kLoop, calls=%all
  %x.3 = f32[512]{0} constant({...})
  %either = f32[512]{0} conditional(%n.3, %x.3, %x.3), branch_computations={%dear, %cheap}
  %gathered = f32[4,512]{1,0} fusion(%either), kind=kCustom, calls=%gathering
  ROOT %t.1 = (s32[], f32[64,512]{1,0}) tuple(%n.3, %z.3)
}

ENTRY %main (z: f32[64,512]) -> (s32[], f32[64,512]) {
  %z.4 = f32[64,512]{1,0} parameter(0)
  %n.4 = s32[] constant(0)
  %start = (s32[], f32[64,512]{1,0}) tuple(%n.4, %z.4)
  %counted = (s32[], f32[64,512]{1,0}) while(%start), condition=%counts, body=%block
  ROOT %found = (s32[], f32[64,512]{1,0}) while(%counted), condition=%unknown, body=%update
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return Program(TEXT)


def test_cycles_count_the_steps_of_loops_and_the_cheaper_branch(program):
    assert program.cycles() == 4 * 100 + 30


def test_reads_of_an_input(program):
    # Four quarters, the whole through its bitcast, and the whole for a copy on the chip.
    assert program.reads(Array("f32", (64, 512))) == 4 / 4 + 1 + 1
    assert program.reads(Array("f32", (64, 511))) == 0


def test_collectives_in_branches_and_fusions(program):
    found = [(step.operation.kind, step.in_loop) for step in program.collectives()]
    assert sorted(found) == [("all-gather", True), ("all-reduce", True)]
    assert program.collectives()[0].operation.origin == "jit(f)/layers_0/add"


def test_arrays_that_are_written_to_main_memory(program):
    large = [str(array) for _, array in program.arrays(64 * 512 * 4)]
    assert large == ["f32[512,64]", "f32[512,64]"]
    assert Array("pred", (3, 5)).bytes == 15 and Array("bf16", (2,)).bytes == 4


def test_products_that_are_not_exact(program):
    assert [exact for _, exact in program.products()] == [True]
    rounded = Program(TEXT.replace(", operand_precision={highest,highest}", ""))
    assert [exact for _, exact in rounded.products()] == [False]


def test_a_program_of_this_machine():
    def update(Z):
        def step(i, total):
            return total + jax.lax.dynamic_slice_in_dim(Z, 8 * i, 8).sum(0)

        return jax.lax.fori_loop(0, 4, step, jnp.zeros(128))

    text = jax.jit(update).lower(jnp.ones((32, 128))).compile().as_text()
    assert Program(text).reads(Array("f32", (32, 128))) == 1


SPREAD = """
HloModule jit_f

%first (a: f32[128]) -> f32[512] {
  %a = f32[128]{0} parameter(0)
  ROOT %gather.1 = f32[512]{0} all-gather(%a), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (b: f32[128]) -> f32[512] {
  %b = f32[128]{0} parameter(0)
  ROOT %gather.2 = f32[512]{0} all-gather(%b), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: f32[128]) -> f32[512] {
  %x = f32[128]{0} parameter(0)
  %start = f32[512]{0} fusion(%x), kind=kCustom, calls=%first
  %end = f32[512]{0} fusion(%x), kind=kCustom, calls=%second
  ROOT %whole = f32[512]{0} all-gather(%x), channel_id=8, dimensions={0}
}
"""  # noqa: E501


def test_a_collective_that_is_spread_over_fusions_counts_once():
    found = Program(SPREAD).collectives()
    assert [step.operation.name for step in found] == ["gather.1", "whole"]
