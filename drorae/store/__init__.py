"""What is already done and what is not: workspaces, stage keys, manifests, leases.

A stage writes into `<workspace>/stages/<stage>/<key>/`; `manifest.json`, written last, commits it.
Local folders and s3:// behave alike. Nothing here imports torch, ray, mlflow or prefect, so
planning a run stays fast.

Read `stage_run.py` first: it is the life of one stage on one screen.
"""
