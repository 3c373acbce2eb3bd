"""The planner, held to what it claims by compilers, by committed programs and by devices."""
