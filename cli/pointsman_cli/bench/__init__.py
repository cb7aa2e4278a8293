"""``pointsman bench``: how fast decisions are, measured on this machine."""
