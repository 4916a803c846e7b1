"""Triton kernels and their launchers, one family per file. Importing one of the files imports triton."""
