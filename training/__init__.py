"""What one update is, and on how many devices."""
