"""Controls while the host samples."""
