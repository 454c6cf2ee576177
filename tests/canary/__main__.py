"""``python -m tests.canary``: names every seam in other packages, whether it changed, and what of ours relies on it.

Run it after a new mlx-lm, ipykernel, llguidance … is out, before anything else fails.
"""

import sys

from tests.canary.seams import SEAMS


def main() -> int:
    """One line for each seam; 1 if one changed."""
    found = [(seam, seam.changed()) for seam in SEAMS]
    for seam, changed in sorted(found, key=lambda one: one[1] is None):
        sys.stdout.write(seam.line(changed) + "\n")
    number = sum(changed is not None for _, changed in found)
    sys.stdout.write(f"{len(found)} seams, {number} changed\n")
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main())
