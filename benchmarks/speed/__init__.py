"""Cost of a step in time and memory."""
