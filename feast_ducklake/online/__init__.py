"""Online stores that write and read Feast's own bytes without a Python object per value."""

from feast_ducklake.quick_import import import_feast

import_feast()  # before any module of this room brings Feast in whole
