"""Triton kernels, what launches them, and how large their tiles are. Needs triton; import it only where it is used."""
