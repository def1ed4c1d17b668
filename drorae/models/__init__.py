"""Networks only: encoder, fusion, decoder, discriminator, diffusion transformer.

No optimiser, device, rank, logging or file layout of a run is known here. Each module holds its own
configuration; import from the module, not from this package.
"""
