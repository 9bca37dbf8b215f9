"""What a running service answers: features, scores and recommendations, in Python and over HTTP."""

from feast_ducklake.quick_import import import_feast

import_feast()  # before any module of this room brings Feast in whole
