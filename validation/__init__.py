"""What must hold: Great Expectations gates that guard every hand-over between jobs.

`run_gate` checks tables and writes Data Docs; `require` stops the job if the gate refused.
"""

from __future__ import annotations

from validation.gates import GateResult, require, run_gate

__all__ = ["GateResult", "require", "run_gate"]
