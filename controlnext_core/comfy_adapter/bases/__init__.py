"""Base models as the rest of the pack sees them: one row a family, one place a site."""
