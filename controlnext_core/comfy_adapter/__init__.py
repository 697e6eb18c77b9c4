"""The only place in the core that imports the host."""
