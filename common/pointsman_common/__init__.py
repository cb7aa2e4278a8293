"""What the processes round the core have in common: logs, words, and files."""
