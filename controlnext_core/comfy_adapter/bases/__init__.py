"""Base models: one row of a table for each family, one place for each site."""
