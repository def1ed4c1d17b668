"""What MLflow 3.17 accepts: an alphabet, lengths, entries in a request (utils/validation.py)."""

import re

MAX_NAME_LENGTH = 250  # MAX_ENTITY_KEY_LENGTH
MAX_PARAM_LENGTH = 6000  # MAX_PARAM_VAL_LENGTH
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100  # MAX_PARAMS_TAGS_PER_BATCH


def legal(name: str) -> str:
    """A metric or parameter name in MLflow's alphabet, at most 250 characters."""
    return re.sub(r"[^\w./ :-]", "_", name)[:MAX_NAME_LENGTH]


def shortened(text: str) -> str:
    """A parameter's value, cut with dots where MLflow would refuse it."""
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."
