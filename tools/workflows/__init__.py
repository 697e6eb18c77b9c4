"""The example workflows, described: one file per kind of control. tools/make_workflows.py writes them."""
