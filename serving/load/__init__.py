"""Load tests of a server: what is asked when, by whom it is measured, and the report of it."""
