"""Every configuration a launcher can choose compiles, offline, into what it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_fast.kernels import cluster, cooperative, few_rows, one_tile, rows, split

import compile_matrix


def test_every_configuration_compiles_without_problems(tmp_path):
    """In a process of its own: this one may be interpreting, and that cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    table = tmp_path / "matrix.json"
    command = (sys.executable, Path(compile_matrix.__file__), "--json", table)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(table.read_text())
    assert len(outcomes) == sum(len(compile_matrix.entries(arch)) for arch in compile_matrix.SHARED_LIMIT)
    assert all(outcome["registers"] > 0 and not outcome["problems"] for outcome in outcomes)


def test_the_matrix_lists_few_rows_in_two_launches_and_in_one():
    found = (dict(e.constexprs) for e in compile_matrix.entries("sm_90") if e.kernel == "few_rows")
    assert {of["STEP"] for of in found} == {1, 2, few_rows.BOTH}


@pytest.fixture(scope="module")
def listed():
    """Of each architecture: (kernel, dtype, tile, warps, stages) of all that the matrix lists."""

    def key(e):
        blocks = dict(e.constexprs)
        return (e.kernel, e.dtype, *(blocks[f"BLOCK_{x}"] for x in "BCD"), e.num_warps, e.num_stages)

    return {arch: {key(e) for e in compile_matrix.entries(arch)} for arch in compile_matrix.SHARED_LIMIT}


def test_the_matrix_lists_every_configuration_a_launcher_can_choose(listed):
    @settings(max_examples=2000, deadline=None)
    @given(
        st.sampled_from(sorted(listed)),
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        st.integers(1, 2**40) | st.integers(1, 5000) | st.integers(1, 70),
        st.integers(1, 300_000) | st.integers(1, 5000),
        st.integers(1, 10_000),
    )
    def check(arch, dtype, b, c, d):
        def is_listed(kernel, config, dtype=dtype):
            return (kernel, compile_matrix.TYPE[dtype], *config[:5]) in listed[arch]

        if c <= one_tile.MAX_CLASSES:
            assert is_listed("one_tile", one_tile.configuration(b, c, d, dtype, arch))
        else:
            assert is_listed("logits", split.configuration(b, c, d, dtype, arch))
            assert is_listed("cooperative", cooperative.configuration(b, c, d, dtype, arch))
            if b <= few_rows.MAX_ROWS and c <= few_rows.MAX_CLASSES:
                config = few_rows.configuration(b, c, d, dtype, arch, compile_matrix.PROCESSORS[arch])
                assert is_listed("few_rows", config)
                assert is_listed("few_rows", config._replace(block_b=1, block_c=1, block_d=1))
            if arch in ("sm_90", "sm_100") and cluster.CLUSTERS and dtype != torch.float32:
                fits = c <= cluster.MAX_CLASSES.get(arch, 4096)
                assert not fits or is_listed("cluster", cluster.configuration(b, c, d, dtype, arch))
        for given_dtype in (dtype, torch.float64):
            wide = torch.promote_types(given_dtype, torch.float32)
            assert is_listed("rows", rows.configuration(b, c, wide, arch), given_dtype)

    check()


SPLIT = """#shared = #ttg.nvmma_shared<{swizzlingByteWidth = 128, elementBitWidth = 16, CGALayout = [[1, 0]]}>
#shared1 = #ttg.nvmma_shared<{swizzlingByteWidth = 128, elementBitWidth = 16, CGALayout = [[0, 1]]}>
  %z = ttng.warp_group_dot %x, %w, %a {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared, #smem, mutable> * \
!ttg.memdesc<64x512xbf16, #shared1, #smem, mutable> -> tensor<128x512xf32, #mma>
"""


def test_features_that_a_cluster_would_split_are_noticed():
    """As the compiler does it where one value feeds the matmul and ‖x‖₁: each CTA then has its rows and all classes."""
    assert not compile_matrix.features_replicated(SPLIT)
    assert compile_matrix.features_replicated(SPLIT.replace("[[1, 0]]", "[[0, 0]]"))
    assert not compile_matrix.features_replicated(SPLIT.replace("[[1, 0]]", "[[0, 0], [1, 0]]"))
    assert not compile_matrix.features_replicated("no matmul at all")
