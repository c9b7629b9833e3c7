"""What a schedule hides of a program's collectives, by hand; test_report.py has a real program."""

import pytest

from rsagent_jax.aot.compiled import Program
from rsagent_jax.aot.schedule import product_flops, schedule_overlap
from rsagent_jax.aot.topology import parse_topology
from tests.aot.test_compiled import CHAIN, loop

V5E = parse_topology("v5e:2x2")  # 4 devices; 197 TFLOP/s, 819 GB/s, two links of 45 GB/s
PRODUCT = 2 * 512**3 / 197e12  # of operands in vector memory
COPY = 2 * 4 * 512 * 512 / 819e9  # read and written in HBM
LONG, SHORT = (3 * 4 * n / 90e9 for n in (2**17, 2**10))  # each of the three others' shards passes a device
assert SHORT < COPY < PRODUCT + COPY < LONG

GIVEN = """  %a = f32[512,512]{1,0:S(1)} parameter(0)
  %h = f32[512,512]{1,0} parameter(1)
  %l = f32[131072]{0} parameter(2)
  %s = f32[1024]{0} parameter(3)
"""
WORK = "  %p = f32[512,512]{1,0:S(1)} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
MOVE = "  %c = f32[512,512]{1,0} copy(%h)\n"
ASIDE = "  %k = (f32[512,512]{1,0:S(1)}, f32[512,512]{1,0}, u32[]) copy-start(%h)\n  %kd = f32[512,512] copy-done(%k)\n"


def start(name, what):
    shape = {"l": "f32[131072]", "s": "f32[1024]"}[what]
    return f"  %{name} = ({shape}, {shape}) all-gather-start(%{what}), dimensions={{0}}\n"


def done(name):
    return f"  %{name}d = f32[4096] all-gather-done(%{name})\n"


def overlap(entry, *computations):
    text = f"HloModule m, is_scheduled=true, num_partitions=4\n\n{''.join(computations)}ENTRY %main () -> s32[] {{\n"
    return schedule_overlap(Program(text + GIVEN + entry + "}\n"), V5E)


@pytest.mark.parametrize(
    ("entry", "work", "hidden", "exposed"),
    [
        (start("g", "s") + WORK + done("g"), PRODUCT, SHORT, 0),
        (start("g", "l") + WORK + MOVE + done("g"), PRODUCT + COPY, PRODUCT + COPY, LONG - PRODUCT - COPY),
        (WORK + start("g", "s") + done("g") + MOVE, PRODUCT + COPY, 0, SHORT),  # nothing runs between them
        (WORK + "  %g = f32[524288] all-gather(%l), dimensions={0}\n" + MOVE, PRODUCT + COPY, 0, LONG),  # synchronous
        (start("g", "s") + ASIDE + done("g"), 0, 0, SHORT),  # a copy between memories is no work
        # The links carry one after the other: while the product runs, first the short one, then a part of the long.
        (start("g", "s") + start("f", "l") + WORK + done("g") + done("f"), PRODUCT, PRODUCT, SHORT + LONG - PRODUCT),
        # What stands first has the links first: to wait for the short one is to wait for the long one, too.
        (start("f", "l") + start("g", "s") + WORK + done("g") + MOVE + done("f"), PRODUCT + COPY, PRODUCT, None),
        (start("g", "s") + WORK, PRODUCT, SHORT, 0),
        (start("g", "s"), 0, 0, SHORT),  # nothing ends it here
    ],
)
def test_what_is_hidden_and_what_is_waited_for(entry, work, hidden, exposed):
    exposed = SHORT + LONG - PRODUCT if exposed is None else exposed
    found = overlap(entry)
    assert (found.work_s, found.hidden_s, found.exposed_s) == pytest.approx((work, hidden, exposed), abs=1e-15)
    assert found.collective_s == pytest.approx(hidden + exposed) and found.step_s == pytest.approx(work + exposed)
    assert (found.asynchronous, found.synchronous) == (entry.count("gather-start("), entry.count("gather("))


def test_loops_multiply_and_run_beside_what_was_started_before():
    """Two times a copy, and a short collective that nothing hides. The counter's first value is 4 bytes
    in HBM; to add to it moves 12, to compare it 9."""
    inside = "  %h = f32[512,512]{1,0} parameter(1)\n  %s = f32[1024]{0} parameter(2)\n" + MOVE + start("g", "s")
    computations, run = loop("loop", bound="constant(2)", body=inside + done("g"))
    found, work = overlap(start("f", "l") + run + done("f"), computations), 2 * COPY + (4 + 2 * (12 + 9)) / 819e9
    assert found.work_s == pytest.approx(work) and found.hidden_s == pytest.approx(work)
    assert found.exposed_s == pytest.approx(LONG - work + 2 * SHORT)
    assert (found.asynchronous, found.synchronous) == (3, 0)
    long, short = found.waits
    assert (long.collective.name, long.seconds) == ("f", pytest.approx(LONG - work)) and not long.synchronous
    assert (short.collective.name, short.seconds) == ("g", pytest.approx(2 * SHORT))


def test_a_chain_of_fusions_is_asynchronous():
    """The product beside it, 64 elements read and written, hides a part of the three shards of 8 elements."""
    found = schedule_overlap(Program(CHAIN), V5E)
    beside, sent = 2 * 64 * 2 / 819e9, 3 * 16 / 90e9
    assert beside < sent and (found.asynchronous, found.synchronous) == (1, 0)
    assert (found.work_s, found.hidden_s, found.exposed_s) == pytest.approx((beside, beside, sent - beside))


def test_kernels_count_as_they_are_told():
    kernel = '  %splash.1 = f32[512,512]{1,0:S(1)} custom-call(%a, %s), custom_call_target="tpu_custom_call"\n'
    text = f"HloModule m, num_partitions=4\n\nENTRY %main () -> s32[] {{\n{GIVEN}{kernel}}}\n"
    told = []
    found = schedule_overlap(Program(text), V5E, lambda *kernel: told.append(kernel) or 197e6)
    assert found.work_s == pytest.approx(1e-6) and told == [("splash.1", ((512, 512), (1024,)))]


@pytest.mark.parametrize(
    ("operation", "shapes", "by_hand"),
    [
        ("f32[4,6] dot(%x, %y), lhs_contracting_dims={1,2}", ((4, 5, 7), (5, 7, 6)), 2 * 4 * 6 * 5 * 7),
        ("f32[4,6] convolution(%x, %y), dim_labels=bf_io->bf", ((4, 5), (5, 6)), 2 * 4 * 5 * 6),
        ("f32[6,4] convolution(%x, %y), dim_labels=fb_oi->fb", ((5, 4), (6, 5)), 2 * 4 * 5 * 6),
        # three products of 4 x 5 and 5 x 6: the window slides over the batch, and is never off its diagonal
        (
            "f32[3,4,6] convolution(%x, %y), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            ((3, 4, 5), (3, 5, 6)),
            3 * 2 * 4 * 5 * 6,
        ),
        # a window of two at nine places, of which it hangs over the edge at two
        (
            "f32[1,9,1] convolution(%x, %y), window={size=2 pad=1_1}, dim_labels=b0f_0io->b0f",
            ((1, 8, 1), (2, 1, 1)),
            2 * (2 * 9 - 2),
        ),
        ("f32[4,5] add(%x, %y)", ((4, 5), (4, 5)), 0),
    ],
)  # fmt: skip
def test_products_of_one_instruction(operation, shapes, by_hand):
    text = f"HloModule m\n\nENTRY %main () -> f32[] {{\n  ROOT %r = {operation}\n}}\n"
    root = Program(text).computations["main"].root
    assert product_flops(root, list(shapes)) == by_hand
