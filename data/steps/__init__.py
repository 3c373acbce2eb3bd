"""What may be done to a corpus before it is tokenized: one room a step, all named in `data.steps`."""
