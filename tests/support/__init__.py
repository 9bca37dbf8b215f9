"""What tests of several rooms use: logs, language models, lakes, and what must come out."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
