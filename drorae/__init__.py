"""DRoRAE: train image tokenizers that fuse all layers of a frozen vision encoder, and latent diffusion models on them."""
