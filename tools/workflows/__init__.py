"""Example workflows as descriptions: one file per kind of control. tools/make_workflows.py writes them."""
