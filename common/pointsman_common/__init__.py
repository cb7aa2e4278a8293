"""What the processes round the core have in common: their logs, and files named to them."""
