"""What a model is worth: requests, scores, suites, and generated programs that are run and tested."""
