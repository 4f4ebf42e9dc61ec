"""Mathematics shared by all time-continuous flows (t = 0 source, t = 1 data)."""
