"""Side-by-side measurements against peers, and their committed results."""
