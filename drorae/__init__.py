"""DRoRAE: image tokenizers that fuse all layers of a frozen encoder, and diffusion models on them.

The encoder is a vision transformer; the diffusion models work on the latents of the tokenizer.
"""
