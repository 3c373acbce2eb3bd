"""Where text comes from: folders, TFDS, Hugging Face, synthetic; each gives documents."""
