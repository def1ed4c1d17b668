"""Proof of exactness: our networks and sampler against tensors of the RAE reference.

Run `python -m drorae.parity DIR`; the command is in `__main__`, the checks of the two halves of a
folder in `diffusion` and `decoding`.
"""
