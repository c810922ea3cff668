"""Versions, devices, and the check of all that runs here."""

import torch

from gradnorm_fast.cli import env
from gradnorm_fast.kernels.device import INTERPRETED

from command_line import run


def test_env_says_what_would_run_and_checks_it(capsys, monkeypatch):
    monkeypatch.setattr(env, "_SHAPES", ((5, 10), (70, 300)))  # the interpreter takes long over the others
    assert run("env", "--check", "--shape", 4, 5, 6) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "4x5x6 float32: " in out and "FAIL" not in out
    checks = [line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("pass")]
    kinds = ("", ", labels", ", predicted")
    by_triton = {f"cpu triton, as chosen{kind}" for kind in kinds} if INTERPRETED else set()
    assert by_triton | {f"cpu torch{kind}" for kind in kinds} <= set(checks)


def test_a_failed_check_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr(env, "_check", lambda device: ["torch FAIL", "tiled pass"])
    assert run("env", "--check") == 2
    assert capsys.readouterr().err == "gradnorm-fast: error: 1 checks failed\n"
