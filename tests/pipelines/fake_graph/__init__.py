"""A small graph without training, to test ordering, retries and reuse with."""
