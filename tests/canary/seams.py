"""Every seam."""

from tests.canary.models import MODELS
from tests.canary.notebook import NOTEBOOK
from tests.canary.port import PORT
from tests.canary.text import TEXT

SEAMS = (*MODELS, *TEXT, *PORT, *NOTEBOOK)
