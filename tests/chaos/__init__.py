"""Breaking a training stage on purpose, and checking that it ends with the right result."""
