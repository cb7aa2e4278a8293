"""The pointsman command line."""
