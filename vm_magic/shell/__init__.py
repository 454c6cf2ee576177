"""The extension in IPython: magics, completion."""
