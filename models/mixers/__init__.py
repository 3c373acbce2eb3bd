"""What mixes the tokens of a row, a file each: `models.mixer` says what such a file gives."""
