"""Text for people: aligned columns, texts cut to a length, counts."""
