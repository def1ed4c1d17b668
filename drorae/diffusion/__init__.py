"""The maths of latent diffusion on the straight path: targets, times, noise, solvers, guidance.

Functions only: no network, no file, and no randomness without a seed or a generator that the caller
passes. Everywhere t = 0 is clean and t = 1 is noise, as in RAE and opposite to SiT.
"""
