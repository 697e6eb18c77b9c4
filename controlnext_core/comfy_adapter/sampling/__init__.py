"""Controls during sampling in the host."""
