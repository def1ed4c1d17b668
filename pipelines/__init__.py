"""Orchestration: the stage table, the Prefect flow, launching, and the `drorae` command. No tensors here."""
