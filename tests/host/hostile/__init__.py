"""Hostile files, recipes and folders from a seeded mutator, and child processes with limits that open them."""
