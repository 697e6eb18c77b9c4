"""Networks as the papers and the released weights define them; nothing here imports the host."""
