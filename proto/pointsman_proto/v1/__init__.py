"""Version 1 of the pointsman API."""
