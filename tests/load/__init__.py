"""Many clients at the port at once, cells of the notebook beside them, and what must hold all the while.

``python -m tests.load`` runs it and prints a table; ``notebooks/load.md`` says what came of it. The kernel with the
model and the port is a process of its own, the clients are in this one. Which requests come is decided by a seed.
"""
