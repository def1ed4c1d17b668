"""Training losses of the tokenizer: pixels, perceptual distance, adversarial terms."""
