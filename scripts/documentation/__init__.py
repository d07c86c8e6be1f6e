"""What `scripts/docs.py` writes into the pages: pictures, tables, interfaces, formulas; and checks of the site."""

from . import diagrams as diagrams  # these draw what pictures.py has
from . import pattern_pictures as pattern_pictures
