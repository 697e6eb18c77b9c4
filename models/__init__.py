"""The networks, as the papers and the released weights define them. Free of the host."""
