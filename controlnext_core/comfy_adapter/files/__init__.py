"""Files of controls in and out: find, detect, load, save, inspect."""
