"""The gate of refactors: the same programs, the same losses to the bit."""
