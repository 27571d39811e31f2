"""Every kernel of tests/calls.py compiled for GPUs that are not there: no spills but named ones, wide loads, and one binary a configuration."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.calls import ROOMS

pytestmark = pytest.mark.aot

HOPPER = "sm_90:float32,float16,bfloat16"
# fp16 compiles as bf16 does
OTHERS = ["sm_80:float32,bfloat16", "sm_100:float32,bfloat16", "sm_120:float32,bfloat16", "gfx942:float32,bfloat16"]
# Debts, in bytes: what waits in local memory while a tile of attention is computed, on Hopper a few numbers that warps of two kinds keep from their
# first item to their last; and int4 in float32, which is for checks, where one scale serves all eight nibbles of a word. No case may grow.
MIXED, INT4, WHOLE = "attention.G16 D256 mixed", "linear_quantized.int4 T3 N5 K40.float32", "linear_quantized.int4 T1 N64 K256.float32"
SPILLS = {"sm_80": {MIXED: 8, INT4: 48},
          "sm_90": {"attention.G4 D128 mixed": 24, "attention.G4 D128 tall": 64, "attention.G4 D64 tall features": 16,
                    "attention.G4 D64 tall 8 apart": 16, "attention.G4 D128 decode by many": 40, "attention.G4 D64 decode by many, features": 12,
                    "attention.G4 D128 fp8 decode by 264": 64, "attention.G4 D128 ready decode by 264": 40, MIXED: 80, WHOLE: 16},
          "sm_100": {MIXED: 112, INT4: 88}, "sm_120": {MIXED: 76, INT4: 96}, "gfx942": {}}
SCHEDULE_SPILLS = 8                              # on sm_80
NO_FP8 = "sm_80"                                 # that generation has no such conversion
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}   # KiB that one program may have


def compiled(*arguments):
    """The JSON of tests/aot.py, run in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tests.aot", *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report():
    return compiled(HOPPER, *OTHERS)


@pytest.fixture(scope="module")
def bad_report():
    return compiled("--calls", "tests.bad_kernels_aot", "sm_90:bfloat16")


def label(row):
    return f"{row['target']} {row['case']} {row['kernel']}"


def assert_compiled(rows):
    failed = [f"{label(row)}: {row['error']}" for row in rows if "error" in row]
    assert not failed, "\n".join(failed)


def assert_nothing_spills(rows):
    spilled = [f"{label(row)}: {row['spills']} spilled bytes, {row.get('local', 0)} local accesses, {row['registers']} registers"
               for row in rows if row.get("spills") or row.get("local")]
    assert not spilled, "\n".join(spilled)


def allowed_spills(row):
    if row.get("kernel") == "_schedule_kernel" and row["target"] == "sm_80":
        return SCHEDULE_SPILLS
    debts, case = SPILLS[row["target"]], row["case"]
    return debts.get(case, debts.get(case.rpartition(".")[0], 0))                # of one dtype, or of all


def needs_fp8(case):
    return case.startswith(("linear_quantized.fp8", "head.fp8", "attention.G4 D128 fp8")) or case == "attention.G4 D64 features.bfloat16"


def assert_nothing_dropped(rows):
    dropped = [f"{label(row)}: {row['dropped']} products dropped by the assembler" for row in rows if row.get("dropped")]
    assert not dropped, "\n".join(dropped)


def assert_fits(rows):
    large = [f"{label(row)}: {row['shared']} bytes of shared memory" for row in rows if row.get("shared", 0) > SHARED[row["target"]] * 1024]
    assert not large, "\n".join(large)


def assert_one_binary(census):
    many = {(row["kernel"], str(row["told apart by"])):
            f"{row['binaries']} binaries for {row['kernel']}, as in {row['case']}, told apart by {row['told apart by']}"
            for row in census["configurations"] if row["binaries"] != 1}
    assert not many, "\n".join(many.values())


def assert_wide_loads(rows, narrow):
    """Unvectorised loads: no more than `narrow`, those of scalars."""
    slow = [f"{label(row)}: {row['narrow']} narrow loads, {row['wide']} of 16 bytes" for row in rows
            if row["narrow"] > narrow or not row["wide"]]
    assert rows and not slow, "\n".join(slow)


def assert_wide_stores(rows, narrow):
    slow = [f"{label(row)}: {row['narrow stores']} narrow stores" for row in rows if row["narrow stores"] > narrow]
    assert rows and not slow, "\n".join(slow)


@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_compiles_without_spills(report, target):
    rows = [row for row in report["kernels"] if row["target"] == target]
    assert {row["case"].split(".")[0] for row in rows} == set(ROOMS)
    assert_compiled([row for row in rows if target != NO_FP8 or not needs_fp8(row["case"])])
    assert_nothing_spills([row for row in rows if row.get("spills", 0) > allowed_spills(row) or row.get("local")])


def test_the_assembler_drops_no_product(report):
    assert_nothing_dropped(report["kernels"])


@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_fits_shared_memory(report, target):
    assert_fits([row for row in report["kernels"] if row["target"] == target])


def test_one_binary_a_configuration(report):
    assert_one_binary(report["census"])
    for room in ROOMS:
        assert any(stood > 5 for case, stood in report["census"]["resizes"].items() if case.startswith(room + ".")), \
            f"no call of {room} could be resized, so nothing was shown"


def test_rmsnorm_loads_16_bytes_a_thread(report):
    hot = [row for row in report["kernels"] if row["target"] == "sm_90" and row["kernel"] == "_rmsnorm_kernel" and "bfloat16" in row["case"]
           and ("D4096" in row["case"] or "D16384" in row["case"])]
    assert_wide_loads(hot, narrow=1)      # num_tokens


def test_quantised_weights_load_16_bytes_a_thread(report):
    hot = [row for row in report["kernels"] if row["target"] == "sm_90" and row["case"].startswith("linear_quantized.") and "bfloat16" in row["case"]
           and not row["kernel"].endswith("_streamed_kernel")                           # whose copies are not the threads'
           and not any(word in row["case"] for word in ("N24 ", "N5 ", "qkv"))]         # odd rows; positions and angles are read one by one
    assert {row["case"].split()[0] for row in hot} == {"linear_quantized.fp8", "linear_quantized.int4"}
    assert {row["kernel"] for row in hot} == {"_linear_kernel", "_norm_gate_up_kernel"}
    assert_wide_loads(hot, narrow=9)      # num_tokens, and up to four each for a thread's biases and scales of whole rows


def test_products_store_vectors(report):
    """Columns whose order the compiler does not know cost a step of 64 rows 7 %."""
    hot = [row for row in report["kernels"] if row["target"] == "sm_90" and "bfloat16" in row["case"] and not re.search("[NF](5|24) ", row["case"])
           and row["kernel"] in ("_linear_kernel", "_norm_gate_up_kernel", "_norm_qkv_kernel")]
    assert {row["case"].split(".")[0] for row in hot} == {"linear", "gate_up", "qkv", "linear_quantized"}
    assert_wide_stores(hot, narrow=2)     # of a counter and of a row's squares


def assert_waits(rows):
    """No kernel that may start early touches memory, or may end, before it has waited for the node ahead."""
    early = [f"{label(row)}: {', '.join(row['early'])} before griddepcontrol.wait" for row in rows if row.get("early")]
    assert not early, "\n".join(early)


def assert_one_instruction(rows, wgmma):
    """All tiles of a kind of weight have the same instruction, whose sums have bits of their own."""
    others = [f"{label(row)}: {row['wgmma']} wgmma" for row in rows if bool(row["wgmma"]) != wgmma]
    assert rows and not others, "\n".join(others)


def test_converted_weights_take_one_instruction_on_hopper(report):
    fused = [row for row in report["kernels"] if row["target"] == "sm_90" and "float32" not in row["case"]
             and row["kernel"] in ("_linear_kernel", "_norm_gate_up_kernel", "_norm_qkv_kernel", "_head_kernel")]
    converted = [row for row in fused if any(word in row["case"] for word in ("fp8", "int4"))]
    assert {row["case"].split(".")[0] for row in converted} == {"linear_quantized", "head"}
    assert_one_instruction(converted, wgmma=False)
    with pytest.raises(AssertionError, match="wgmma"):
        assert_one_instruction(fused, wgmma=False)


def test_overlapping_nodes_wait_first(report):
    overlapping = ("sm_90", "sm_100", "sm_120")
    alone = [label(row) for row in report["kernels"] if ("early" in row) != (row["target"] in overlapping) and "error" not in row]
    assert not alone, "\n".join(alone)
    assert_waits([row for row in report["kernels"] if "early" in row])


def case(bad_report, name):
    return [row for row in bad_report["kernels"] if row["case"] == name]


@pytest.mark.parametrize("name, kernel", [("specialised", "_specialised_kernel"), ("stride", "_specialised_stride_kernel"),
                                          ("alignment", "_specialised_alignment_kernel")])
def test_a_second_binary_is_caught(bad_report, name, kernel):
    rows = [row for row in bad_report["census"]["configurations"] if row["kernel"] == kernel]
    with pytest.raises(AssertionError, match=f"[2-9] binaries for {kernel}"):
        assert_one_binary({"configurations": rows})


def test_spills_are_caught(bad_report):
    with pytest.raises(AssertionError, match=r"spilling _spilling_kernel: [1-9][0-9]* spilled bytes"):
        assert_nothing_spills(case(bad_report, "spilling"))
    assert_nothing_spills(case(bad_report, "scalar loads"))


def test_a_dropped_product_is_caught(bad_report):
    with pytest.raises(AssertionError, match=r"_dropping_kernel: [1-9][0-9]* products dropped"):
        assert_nothing_dropped(case(bad_report, "dropped"))


def test_shared_memory_is_caught(bad_report):
    with pytest.raises(AssertionError, match=r"_greedy_for_shared_memory_kernel: [0-9]* bytes of shared memory"):
        assert_fits(case(bad_report, "shared"))
    assert_fits(case(bad_report, "spilling"))


@pytest.mark.parametrize("mode, words", [("load", r"ld\.global\S*"), ("hint", r"%\w+, a hint that is used after,"), ("branch", ".*bra.*"),
                                         ("none", "no griddepcontrol.wait")])
def test_control_a_node_that_does_not_wait_is_caught(bad_report, mode, words):
    assert_waits(case(bad_report, "overlap good") + case(bad_report, "overlap unused"))
    with pytest.raises(AssertionError, match=rf"overlap {mode} _early_kernel: {words} before griddepcontrol.wait"):
        assert_waits(case(bad_report, f"overlap {mode}"))


def test_control_warps_that_do_not_wait_are_caught(bad_report):
    assert_waits(case(bad_report, "overlap halves wait") + case(bad_report, "overlap half unused"))
    with pytest.raises(AssertionError, match=r"overlap one half waits _early_half_kernel: st\.global\S* before griddepcontrol.wait"):
        assert_waits(case(bad_report, "overlap one half waits"))
    with pytest.raises(AssertionError, match=r"overlap half hint _early_half_kernel: %\w+, a hint that is used after"):
        assert_waits(case(bad_report, "overlap half hint"))


def test_control_boxes_that_are_no_weights_are_caught(bad_report):
    assert_waits(case(bad_report, "copying good") + case(bad_report, "copying first"))
    with pytest.raises(AssertionError, match=r"copying second _copying_streamed_kernel: cp\.async\.bulk\.tensor\S* before griddepcontrol.wait"):
        assert_waits(case(bad_report, "copying second"))


@pytest.mark.parametrize("mode, words", [("no fence", r"st\.global\S*"), ("no end", "no wait at the end, .*")])
def test_control_a_node_beside_the_one_ahead_is_caught(bad_report, mode, words):
    assert_waits(case(bad_report, "following good"))
    with pytest.raises(AssertionError, match=rf"following {mode} _following_kernel: {words} before griddepcontrol.wait"):
        assert_waits(case(bad_report, f"following {mode}"))


def test_narrow_loads_are_caught(bad_report):
    with pytest.raises(AssertionError, match=r"_scalar_loads_kernel: [0-9]* narrow loads"):
        assert_wide_loads(case(bad_report, "scalar loads"), narrow=0)


def test_narrow_stores_are_caught(bad_report):
    with pytest.raises(AssertionError, match=r"_scalar_loads_kernel: [1-9][0-9]* narrow stores"):
        assert_wide_stores(case(bad_report, "scalar loads"), narrow=0)
    assert_wide_stores(case(bad_report, "spilling"), narrow=0)


def test_an_interpreting_process_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-m", "tests.aot", "sm_90:float32"], env=environment, capture_output=True, text=True)
    assert run.returncode and "TRITON_INTERPRET is set" in run.stderr
