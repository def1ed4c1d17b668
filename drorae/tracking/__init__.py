"""MLflow: one parent run per pipeline run, one nested run per stage, continued across attempts.

`runs` opens and ends runs; `delivery` sends what a stage logs, from a thread with a bounded queue
(`outbox`), so that neither a slow nor an absent server blocks a training step. `client` is the only
module that imports mlflow, by MlflowClient alone: no global run, no autologging. SQLite serves
several processes of one machine; a cluster uses a server. Files under ./mlruns are never made.
"""

from drorae.tracking.delivery import MlflowTracker, connect
from drorae.tracking.runs import finish_run, open_run
from drorae.tracking.tracker import NullTracker, Tracker

__all__ = ["MlflowTracker", "NullTracker", "Tracker", "connect", "finish_run", "open_run"]
