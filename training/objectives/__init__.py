"""What is minimized: one file an objective, found by its name (`objective=NAME`)."""
