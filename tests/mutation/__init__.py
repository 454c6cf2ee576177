"""Mutants of ``engine/core``: small changes to its code, each of which some test must notice."""
