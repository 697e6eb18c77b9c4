"""Control files: find, detect, load, save, inspect."""
