"""What other packages have that we rely on without its being promised: each seam tried by itself, one line each."""
