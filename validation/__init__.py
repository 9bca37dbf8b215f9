"""What must hold: the checks of every hand-over between jobs, run by Great Expectations.

`run_gate` checks tables and writes Data Docs; `require` stops the job if the gate refused.
"""

from __future__ import annotations

from validation.gates import GateResult, require, run_gate

__all__ = ["GateResult", "require", "run_gate"]
