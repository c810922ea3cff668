"""Runs compiled Triton kernels on the CPU, at the level of PTX; README.md has the outline."""
