"""The ground that every room stands on: checks, files, text, this host. Imports nothing of ours."""
