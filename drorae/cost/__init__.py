"""What a configuration costs before anything runs: parameters, FLOPs, memory, storage, GPU-hours.

Networks are built on the meta device, which has shapes and no numbers, so no weight file is read;
parameters and FLOPs are counted there, not derived from formulas.
"""
