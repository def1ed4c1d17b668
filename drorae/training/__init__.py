"""Training loops as plain functions, and what they share.

Shared are the configuration (`jobs`, without torch), optimiser, EMA, guards, checkpointed state and
the Ray worker entry. Import from the module, not from this package.
"""
