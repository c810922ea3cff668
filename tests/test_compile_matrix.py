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

from gradnorm_fast.kernels import one_tile, rows, split

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
        st.integers(1, 2**40) | st.integers(1, 5000),
        st.integers(1, 300_000) | st.integers(1, 300),
        st.integers(1, 10_000),
    )
    def check(arch, dtype, b, c, d):
        name = compile_matrix.TYPE[dtype]
        if c <= one_tile.MAX_CLASSES:
            assert ("one_tile", name, *one_tile.configuration(b, c, d, dtype, arch)) in listed[arch]
        else:
            assert ("logits", name, *split.configuration(b, c, d, dtype, arch)) in listed[arch]
        for given_dtype in (dtype, torch.float64):
            name = compile_matrix.TYPE[given_dtype]
            assert ("rows", name, *rows.configuration(b, c, given_dtype, arch)) in listed[arch]

    check()
