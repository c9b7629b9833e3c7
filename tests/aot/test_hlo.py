"""Parsing of programs: what stands in an instruction, and how often a loop's body runs."""

import pytest

from rsagent_jax.aot.hlo import Array, leaves, read_program


def loop(start="0", bound="7", direction="LT", update="add(%i, %one)", config="", extra="") -> str:
    return f"""HloModule jit_f, is_scheduled=true, num_partitions=4

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %state = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x = f32[8]{{0}} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %minus = s32[] constant(-2)
  %twice = f32[8]{{0}} add(%x, %x)
  %next = s32[] {update}
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %twice)
}}

%less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction={direction}
}}

%condition (state.1: (s32[], f32[8])) -> pred[] {{
  %state.1 = (s32[], f32[8]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant({bound})
  ROOT %fusion = pred[] fusion(%i.1, %bound), kind=kLoop, calls=%less
}}

ENTRY %main (x.1: f32[8], n: s32[]) -> f32[8] {{
  %x.1 = f32[8]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] {"parameter(1)" if start == "n" else f"constant({start})"}
  %copy.1 = s32[]{{:S(6)}} copy(%start)
  %first = (s32[], f32[8]{{0}}) tuple(%copy.1, %x.1)
  %loop = (s32[], f32[8]{{0}}) while(%first), condition=%condition, body=%body{extra}{config}
  ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ({}, 7),
        ({"start": "2"}, 5),
        ({"direction": "LE"}, 8),
        ({"direction": "NE"}, 7),
        ({"start": "9"}, 0),
        ({"start": "6", "bound": "0", "direction": "GT", "update": "add(%i, %minus)"}, 3),  # 6, 4, 2
        ({"start": "6", "bound": "0", "direction": "GE", "update": "subtract(%i, %one)"}, 7),
        ({"config": ', backend_config={"known_trip_count":{"n":"11"}}', "start": "n"}, 11),
    ],
)
def test_trip_counts(given, runs):
    program = read_program(loop(**given))
    assert program.runs.get("body", 0) == runs and program.unknown_trip_counts == ()
    assert program.devices == 4 and program.fused == {"less"}


@pytest.mark.parametrize(
    "given",
    [
        {"start": "n"},  # an argument
        {"update": "multiply(%i, %i)"},
        {"update": "add(%i, %minus)"},  # never ends
        {"start": "1", "bound": "8", "direction": "NE", "update": "add(%i, %minus)"},
    ],
)
def test_an_unknown_trip_count_is_reported_and_counts_once(given):
    program = read_program(loop(extra=', metadata={op_name="jit(f)/while"}', **given))
    assert program.runs["body"] == 1
    assert program.unknown_trip_counts == ("loop (jit(f)/while)",)


def test_nested_loops_multiply_and_bounds_may_be_carried():
    """The bound of the inner loop stands in the outer loop's state, where every iteration leaves it as it was."""
    text = """HloModule nested

%inner (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %i.1 = s32[] add(%two, %i)
  ROOT %out = (s32[], s32[]) tuple(%i.1, %n)
}

%inner_condition (s.1: (s32[], s32[])) -> pred[] {
  %s.1 = (s32[], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %gt = pred[] compare(%n.1, %i.2), direction=GT
}

%outer (s.2: (s32[], s32[])) -> (s32[], s32[]) {
  %s.2 = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%s.2), index=0
  %n.2 = s32[] get-tuple-element(%s.2), index=1
  %one = s32[] constant(1)
  %zero = s32[] constant(0)
  %first = (s32[], s32[]) tuple(%zero, %n.2)
  %while.1 = (s32[], s32[]) while(%first), condition=%inner_condition, body=%inner
  %j.1 = s32[] add(%j, %one)
  ROOT %out.1 = (s32[], s32[]) tuple(%j.1, %n.2)
}

%outer_condition (s.3: (s32[], s32[])) -> pred[] {
  %s.3 = (s32[], s32[]) parameter(0)
  %j.2 = s32[] get-tuple-element(%s.3), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%j.2, %three), direction=LT
}

ENTRY %main () -> s32[] {
  %zero.1 = s32[] constant(0)
  %five = s32[] constant(5)
  %first.1 = (s32[], s32[]) tuple(%zero.1, %five)
  %while.2 = (s32[], s32[]) while(%first.1), condition=%outer_condition, body=%outer
  ROOT %r = s32[] get-tuple-element(%while.2), index=0
}
"""
    program = read_program(text)
    assert program.unknown_trip_counts == ()
    assert program.runs["outer"] == 3 and program.runs["inner"] == 3 * 3  # 0, 2, 4


def test_of_a_conditional_the_largest_branch_counts():
    branch = """%b{n} (x{n}: f32[8]) -> f32[] {{
  %x{n} = f32[8]{{0}} parameter(0)
  %long{n} = f32[{n},8]{{1,0}} broadcast(%x{n}), dimensions={{1}}
  ROOT %z{n} = f32[] custom-call(%long{n}), custom_call_target="f"
}}
"""
    text = f"""HloModule jit_f

{"".join(branch.format(n=n) for n in (3, 9, 5))}
ENTRY %main (i: s32[], x: f32[8]) -> f32[] {{
  %i = s32[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %y = f32[] conditional(%i, %x, %x, %x), branch_computations={{%b3, %b9, %b5}}
}}
"""
    assert read_program(text).runs == {"main": 1, "b9": 1}


def test_what_stands_in_an_instruction():
    """Layouts with memory spaces, attributes over several lines, parentheses in strings, and a thread's name."""
    text = """HloModule m, replica_count=2, num_partitions=4

%called (p: bf16[4,8], t: token[]) -> bf16[16,8] {
  %t = token[] parameter(1)
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="f(x[0]) \\"quoted\\""}
  %kernel.1 = (f32[2,3]{1,0}, /*index=1*/s4[10]{0:S(5)}) custom-call(%p.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "(1, 2"
}}, metadata={op_name="jit(f)/k"}, backend_config={"custom_call_config":{"body":"a}b)","cost_estimate":{"flops":"7"}}}
  %start = ((bf16[4,8], token[]), bf16[16,8]) call-start(%p.1), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[16,8] call-done(%start)
}
"""  # noqa: E501
    program = read_program(text)
    assert program.devices == 8 and program.runs == {"main": 1, "called": 1}
    main = program.computations["main"]
    assert main["p.1"].shape == Array("bf16", (4, 8), 1) and main["p.1"].shape.bytes == 64
    assert main["p.1"].shape.hbm_bytes == 0  # vector memory
    kernel = main["kernel.1"]
    assert kernel.shape == (Array("f32", (2, 3)), Array("s4", (10,), 5))
    assert [leaf.bytes for leaf in leaves(kernel.shape)] == [24, 5]
    assert (kernel.operands, kernel.target, kernel.op_name) == (("p.1",), "tpu_custom_call", "jit(f)/k")
    assert kernel.config["custom_call_config"]["cost_estimate"] == {"flops": "7"}
    assert main["start"].called == ("called",) and main.root.name == "done"


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule nothing\n")
    with pytest.raises(ValueError, match="calls lost"):
        read_program("HloModule m\n\nENTRY %e (p: f32[]) -> f32[] {\n  ROOT %c = f32[] call(), to_apply=%lost\n}\n")
