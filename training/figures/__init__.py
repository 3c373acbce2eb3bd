"""What other weights say of a run's tokens: references and teachers, kept beside the tokens."""
