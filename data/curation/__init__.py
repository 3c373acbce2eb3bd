"""What is done to a corpus before it is tokenized, and how two corpora compare; training does without."""
