"""Cost models fitted to measurements of real engines."""
