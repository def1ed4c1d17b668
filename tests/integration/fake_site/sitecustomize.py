"""Puts the fake graph in place of the real one in the processes of the services under test."""

import os
import sys

COMMANDS = ("prefect", "pipelines")

if os.environ.get("FAKE_JOURNAL") and any(word in " ".join(sys.orig_argv) for word in COMMANDS):
    from fake_graph import stages

    stages.install()
