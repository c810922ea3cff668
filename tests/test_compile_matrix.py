"""The kernels that real heads launch compile, without a GPU, into the code that is expected of them."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_fast.kernels import config, one_tile, rows, tiled
from gradnorm_fast.kernels.experimental import cluster

import compile_matrix


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_compiles_without_problems(tmp_path, arch):
    """One architecture for each way to multiply and to copy; `make kernels` compiles for all."""
    if arch == "gfx942":
        pytest.importorskip("triton", minversion="3.4", reason="older versions take the linker of an installed ROCm")
    table = tmp_path / "matrix.json"
    done = matrix("--quick", "--arch", arch, "--json", table)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(table.read_text())
    kernels = {"one_tile", "logits", "rows", "one_hot", "merge"}
    kernels |= {"cluster"} if arch == "sm_90" and cluster.CLUSTERS else set()
    assert {outcome["kernel"] for outcome in outcomes} == kernels
    assert all(outcome["arch"] == arch for outcome in outcomes)
    assert all(outcome["registers"] > 0 and not outcome["problems"] for outcome in outcomes)
    operands = {operand for outcome in outcomes for operand in outcome["operands"]}
    assert (arch == "sm_90") == bool(operands) and all(operand.endswith("sound") for operand in operands)


def matrix(*arguments):
    """Run the script, on this worker's cores, in a process that can compile: this one cannot while it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    jobs = os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    command = (sys.executable, compile_matrix.__file__, *arguments, "--jobs", str(max(jobs, 1)))
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(list(compile_matrix.ARCHITECTURES)),
    st.sampled_from(compile_matrix.DTYPES),
    st.integers(1, 2**40) | st.integers(1, 5000) | st.integers(1, 70),
    st.integers(1, 300_000) | st.integers(1, 5000),
)
def test_every_line_of_the_kernels_tables_is_in_the_matrix(arch, dtype, b, c):
    for kernel in (one_tile, tiled, rows, cluster):
        with contextlib.suppress(ValueError):  # the kernel takes no such problem
            assert config.choose(kernel.TABLE, shape(b, c, dtype, arch)) in of_the_matrix(kernel, arch, dtype)


def shape(b, c, dtype, arch):
    return config.Shape(b, c, 64, dtype, arch, 100)


@functools.cache
def of_the_matrix(kernel, arch, dtype):
    """The configurations that the problems of the matrix take."""
    found = set()
    for b, (c, _) in itertools.product(compile_matrix.BATCHES, compile_matrix.HEADS):
        with contextlib.suppress(ValueError):
            found.add(config.choose(kernel.TABLE, shape(b, c, dtype, arch)))
    return found


def test_a_process_that_interprets_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["compile_matrix.py"])
    with pytest.raises(SystemExit):
        compile_matrix.main()


PTX = """
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 };
	ld.global.b16 { %rs0 }, [ %rd0 + 0 ];
$L__BB0_1:
	ld.global.v4.b16 { %rs1 }, [ %rd1 + 0 ];
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r2;
	@%p2 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 };
	@%p1 bra $L__BB0_1;
$L__BB0_2:
	ld.global.b16 { %rs2 }, [ %rd3 + 0 ];
	@%p1 bra $L__BB0_2;
"""
AMD = """
.LBB0_1:
	buffer_load_ushort v11, v11, s[76:79], 0 offen
	buffer_load_dwordx4 v[0:3], v11, s[76:79], 0 offen
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_1
	buffer_load_ushort v11, v11, s[76:79], 0 offen
"""


SASS = """
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDL R3, [R1] ;
        /*0050*/                   BRA `(.L_x_2);
.L_x_2:
"""


@pytest.mark.parametrize("assembly", [PTX, AMD])
def test_loads_of_two_bytes_count_where_a_loop_multiplies(assembly):
    def narrow(assembly):
        return compile_matrix.in_loops(assembly, compile_matrix.NARROW, beside=compile_matrix.MATMUL)

    assert narrow(assembly) == 1
    assert narrow(assembly.replace("mma", "add").replace("mfma", "add")) == 0


def test_spills_count_in_loops():
    assert compile_matrix.in_loops(SASS, compile_matrix.SPILL) == 1


def test_the_tensor_core_instruction_follows_from_the_product():
    def expected(arch, shape, options="", warps=4):
        ttir = f"%z = tt.dot %x, %w, %a{options} : tensor<{shape}> * tensor<64x16xf16> -> tensor<64x16xf32>"
        return compile_matrix.tensor_core_instruction(arch, warps, ttir)

    assert expected("sm_80", "64x64xf16") == expected("sm_120", "64x64xbf16") == "mma.sync"
    assert expected("sm_90", "64x64xf16") == "wgmma" and expected("sm_90", "32x64xf16") == "mma.sync"
    assert expected("sm_103", "128x64xf16") == "tcgen05.mma" and expected("gfx942", "16x64xf16") == "mfma"
    assert expected("sm_90", "64x32xf32") is None
    assert expected("sm_90", "64x32xf32", ", inputPrecision = tf32") == "wgmma"
    assert compile_matrix.tensor_core_instruction("sm_90", 4, "no product") is None


SPLIT = """#shared = #ttg.nvmma_shared<{swizzlingByteWidth = 128, elementBitWidth = 16, CGALayout = [[1, 0]]}>
#shared1 = #ttg.nvmma_shared<{swizzlingByteWidth = 128, elementBitWidth = 16, CGALayout = [[0, 1]]}>
  %z = ttng.warp_group_dot %x, %w, %a {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared, #smem, mutable> * \
!ttg.memdesc<64x512xbf16, #shared1, #smem, mutable> -> tensor<128x512xf32, #mma>
"""


def test_features_that_a_cluster_would_split_are_noticed():
    """The compiler does that where one value feeds the matmul and ‖x‖₁: each CTA gets some rows and all classes."""
    assert not compile_matrix.features_replicated(SPLIT)
    assert compile_matrix.features_replicated(SPLIT.replace("[[1, 0]]", "[[0, 0]]"))
    assert not compile_matrix.features_replicated(SPLIT.replace("[[1, 0]]", "[[0, 0], [1, 0]]"))
    assert not compile_matrix.features_replicated("no matmul at all")
