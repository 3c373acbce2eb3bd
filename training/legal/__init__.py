"""What cannot be had, and the nearest mesh that can."""
