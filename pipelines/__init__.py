"""Orchestration: stage table, Prefect flow, launching, the `drorae` command. No tensors."""
