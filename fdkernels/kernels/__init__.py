"""Triton kernels, their launchers and their tile sizes. Needs triton, so import it only where it is used."""
