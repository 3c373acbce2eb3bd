"""The schema of every key, and the YAML groups that give them values."""
