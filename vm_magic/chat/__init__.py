"""One message in the notebook: submit, follow, call functions."""
