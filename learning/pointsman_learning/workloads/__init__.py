"""What is asked, when, and how well each expert answers it."""
