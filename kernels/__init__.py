"""Kernels of Penstock: reference, Triton kernel and dispatch side by side, one kernel a file."""
