"""What a step will take on devices that one does not have: memory, work, traffic, and from them its time."""
