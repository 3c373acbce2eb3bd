"""What a run does when something goes wrong: signals, stalls, spikes, replicas that differ."""
