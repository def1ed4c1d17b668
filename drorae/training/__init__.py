"""Training loops as plain functions, and what they share: optimiser, EMA, guards, the Ray worker entry."""
