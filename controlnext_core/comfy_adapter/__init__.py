"""Adapter to the host: the only part of the core that imports it."""
