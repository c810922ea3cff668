"""The static race check finds a shared-memory buffer that is refilled under an asynchronous product."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import buffer_reuse

pytest.importorskip("triton", minversion="3.6", reason="compiles and reads TTGIR as Triton 3.6 and later have it")

TILED = """
import json, torch, triton, compile_matrix
from gradnorm_fast.kernels import dispatch, tiled
from gradnorm_fast.kernels.config import Config
from gradnorm_fast.kernels.problem import Problem, Scores
found = {}
for arch in ("sm_90", "sm_100"):
    for tma in (False, True):
        def compile_(source, target, options):
            if source.fn is tiled.logits_kernel:
                found[f"{arch} {tma}"] = triton.compile(source, target, options).asm["ttgir"]
        compile_matrix.pretend(arch, compile_)
        x, w = (torch.empty(n, 2048, dtype=torch.float16, device="meta") for n in (4096, 1000))
        scores = Scores(torch.empty(1, 4096, device="meta"), None)
        dispatch.run(tiled, Problem(x, w, None), scores, Config(128, 128, 64, 8, 3, tma))
print(json.dumps(found))
"""


def compiled(*command):
    """Run a command in a process that can compile, as this one cannot while it interprets; the JSON that it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(buffer_reuse.__file__).parent), *sys.path])
    done = subprocess.run((sys.executable, *command), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_old_one_tile_is_found_at_every_depth_and_size():
    cases = compiled(Path(__file__).with_name("fixtures") / "racing_one_tile.py")
    assert {tuple(case[:2]) for case in cases} >= {(rows, stages) for rows in (64, 128) for stages in (2, 3, 4)}
    for rows, stages, ttgir in cases:
        x, w = buffer_reuse.operands(ttgir) or (None, None)
        if rows == 32:  # multiplied by mma.sync
            assert not x
            continue
        assert (x.buffers, x.pending, x.race) == (stages - 1, 1, True)
        assert (w.buffers, w.pending, w.race) == (stages, 1, False)
        assert buffer_reuse.races(ttgir) == [x]


@pytest.fixture(scope="module")
def tiled():
    return compiled("-c", TILED)


def spoiled(ttgir, old, new=""):
    """The TTGIR with `old` replaced in the main loop's last line that has it; without `new` the line is removed."""
    lines = ttgir.splitlines()
    start = next(i for i, line in enumerate(lines) if "scf.for" in line)
    stop = next(i for i, line in enumerate(lines) if i > start and line.lstrip().startswith("}"))
    at = max(i for i in range(start, stop) if old in lines[i])
    lines[at] = lines[at].replace(old, new) if new else ""
    return "\n".join(lines)


@pytest.mark.parametrize("tma", [False, True])
def test_a_tiled_matmul_that_waits_for_one_product_too_few_is_found(tiled, tma):
    hopper = tiled[f"sm_90 {tma}"]
    assert not buffer_reuse.races(hopper)
    assert [operand.pending for operand in buffer_reuse.operands(hopper)] == [1, 1]
    late = buffer_reuse.operands(spoiled(hopper, "pendings = 1", "pendings = 2"))
    assert [(operand.pending, operand.race) for operand in late] == [(2, True), (2, True)]


@pytest.mark.parametrize("tma", [False, True])
def test_a_product_on_tensor_memory_that_nobody_waits_for_is_found(tiled, tma):
    blackwell = tiled[f"sm_100 {tma}"]
    assert [operand.pending for operand in buffer_reuse.operands(blackwell)] == [1, 1]
    assert not buffer_reuse.races(blackwell)
    assert len(buffer_reuse.races(spoiled(blackwell, "ttng.wait_barrier"))) == 2


LOOP = """
module {
  tt.func public @kernel(%D: i32) {
    %x = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xf16, #shared, #smem, mutable>
    %last = scf.for %i = %c0 to %D step %c1 iter_args(%at = %c0) -> (i32) : i32 {
      %read = ttg.memdesc_index %x[%at] : !ttg.memdesc<2x64x64xf16> -> !ttg.memdesc<64x64xf16>
      %z = ttng.warp_group_dot %read, %read, %zero {isAsync = true} : !ttg.memdesc<64x64xf16> -> tensor<64x64xf32>
      %next = arith.xori %at, %c1 : i32
      %fill = ttg.memdesc_index %x[%next] : !ttg.memdesc<2x64x64xf16> -> !ttg.memdesc<64x64xf16>
      ttg.local_store %value, %fill : tensor<64x64xf16> -> !ttg.memdesc<64x64xf16>
      %done = ttng.warp_group_dot_wait %z {pendings = 0 : i32} : tensor<64x64xf32>
      scf.yield %next : i32
    }
  }
}
""".replace("{\n    %x", "{\n    %c0 = arith.constant 0 : i32\n    %c1 = arith.constant 1 : i32\n    %x", 1)


def test_buffer_indices_decide():
    assert [operand[1:4] for operand in buffer_reuse.operands(LOOP)] == [(2, 1, False)]
    assert buffer_reuse.races(LOOP.replace("local_store %value, %fill", "local_store %value, %read"))
    assert buffer_reuse.races(LOOP.replace("arith.xori", "tt.load")), "an index that is not known may be any"
    assert buffer_reuse.races(LOOP.replace("pendings = 0", "pendings = 2"))


def test_unknown_operations_on_shared_memory_are_refused():
    with pytest.raises(ValueError, match=r"does not know: ttg\.new_store"):
        buffer_reuse.operands(LOOP.replace("local_store", "new_store"))
